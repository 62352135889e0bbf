"""Time a training step on one GPU, and show what its time goes into.

    make bench-step
    python -m benchmarks.bench_step --variants default documents --json bench-step.json

A Llama of 1.3 billion parameters on 32,768 tokens, ZeRO 1, in four variants:

default        this program with its default kernels and fused operations
torch          with torch's operations instead of fused ones
documents      packed documents
transformers   transformers' Llama, if it is installed: torch's attention, gradient checkpointing,
               AdamW on the weights themselves. It computes less: no float32 copy of the weights

The figures are medians of --steps steps after two. The share of the peak FLOP/s counts matrix
products of visible pairs, without recomputation, against the data sheet (plan/device_peaks.py). One
more step runs under torch.profiler; its kernels' times are added up by category, and idle is the
rest of a step. Peak memory is the allocator's.

Every variant has a process of its own, so that none keeps memory of another. They start together,
because imports take most of the start, and measure one after another. Needs DeepSpeed, except for
transformers' variant. Variants that --minutes leaves no time for are skipped; the JSON file is
complete after each variant.
"""

import argparse
import gc
import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
from torch.profiler import record_function

from benchmarks.common import DTYPES, ResultsFile, missing_gpu, setting
from benchmarks.document_packs import random_starts
from benchmarks.step_profile import CATEGORIES, OPTIMIZER_STEP, profile_step
from megatron_ring.config import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from megatron_ring.errors import ConfigError, counted, not_positive, reporting_errors
from megatron_ring.plan.device_peaks import peak_flops
from megatron_ring.plan.flops import training_flops
from megatron_ring.settings.precision import device_type

VARIANTS = ("default", "torch", "documents", "transformers")
WARM_UP = 2
GIB = 2**30

Step = Callable[[], None]
Row = dict[str, Any]


def main() -> None:
    options = _parser().parse_args()
    sizes = ("layers", "hidden", "heads", "ffn", "vocab", "tokens", "mean_document", "steps")
    problems = missing_gpu(options.device, "time a smaller model on the CPU (--layers, --tokens)")
    if problems := problems + not_positive(options, *sizes):
        raise ConfigError(problems)
    if options.device == "cpu" and torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the processes started below
    # No messages about the profiler's start and end, from the processes started below.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    results = ResultsFile(options.json, setting("bench_step", options, options.device))
    print(f"{results.findings['device']}, torch {torch.__version__}, {_shape(options)}")
    print(
        f"{'variant':>13}{'tokens/s':>11}{'of peak FLOP/s':>16}{'peak GiB':>10}{'step ms':>9}",
        end="",
    )
    print("".join(f"{name:>17}" for name in CATEGORIES), flush=True)
    rows = list(measure_each(options, lambda row: results.add("variants", row)))
    raise SystemExit(any("error" in row for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048, help="width of the residual stream")
    parser.add_argument("--heads", type=int, default=16, help="query and key-value heads")
    parser.add_argument("--ffn", type=int, default=5504, help="width of the feed-forward network")
    parser.add_argument("--vocab", type=int, default=4096, help="token ids")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of the step's sequence")
    parser.add_argument("--dtype", choices=[*DTYPES], default="bf16")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="selective")
    parser.add_argument(
        "--mean-document", type=int, default=4096, help="mean length of the packed documents"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument(
        "--minutes", type=float, default=2.5, help="start no variant after this time"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", default="", help="also write the results to this file")
    return parser


def _shape(options: argparse.Namespace) -> str:
    return (
        f"{counted(options.layers, 'layer')}, {options.hidden} wide, {options.heads} heads, "
        f"{options.tokens:,} tokens, {options.dtype}, --recompute {options.recompute}"
    )


# ---- processes ----


def measure_each(options: argparse.Namespace, on_row: Callable[[Row], None]) -> Iterator[Row]:
    """Yield the row of each variant, printed and passed to ``on_row`` once it is measured."""
    deadline = time.monotonic() + 60 * options.minutes
    variants = [name for name in options.variants if _is_installed(name)]
    context = multiprocessing.get_context(START_METHOD)
    processes = {}
    for variant in variants:
        own, other = context.Pipe()
        process = context.Process(target=_process, args=(variant, options, other), daemon=True)
        process.start()
        other.close()
        processes[variant] = process, own
    for variant, (process, connection) in processes.items():
        if time.monotonic() > deadline:
            print(f"{variant:>13}  skipped, out of time", flush=True)
            process.kill()
            continue
        row = {"variant": variant} | _run(process, connection)
        on_row(row)
        _print_row(row)
        yield row


START_METHOD = "spawn"


def _is_installed(variant: str) -> bool:
    if variant != "transformers" or importlib.util.find_spec("transformers"):
        return True
    print(f"{variant:>13}  skipped: transformers is not installed")
    return False


def _run(process: multiprocessing.process.BaseProcess, connection: Connection) -> Row:
    """Let a process measure its variant; return its row, or why it failed."""
    try:
        connection.send("start")
        return connection.recv()
    except (EOFError, OSError):
        process.join()
        return {"error": f"its process ended with code {process.exitcode}"}
    finally:
        process.join()


def _process(variant: str, options: argparse.Namespace, connection: Connection) -> None:
    """Import what the variant needs, wait for the turn, measure, and send the row."""
    if variant == "transformers":
        import transformers.models.llama.modeling_llama  # noqa: F401
    else:
        import megatron_ring.training.assembly  # noqa: F401
    connection.recv()
    try:
        row = measure(variant, options)
    except Exception as error:  # the other variants are measured all the same
        row = {"error": f"{type(error).__name__}: {error}"}
    connection.send(row)


# ---- measurement ----


def measure(variant: str, options: argparse.Namespace) -> Row:
    """Time and profile one variant in this process."""
    device = device_type()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = _transformers_step(options) if variant == "transformers" else _own_step(variant, options)
    for _ in range(WARM_UP):
        step()
    milliseconds = statistics.median(_milliseconds(step, device) for _ in range(options.steps))
    gc.collect()
    # The data-sheet peak, or on a CPU a measured one.
    peak, source = peak_flops(device, DTYPES[options.dtype])
    rate = _flops(variant, options) / milliseconds * 1e3
    return {
        "tokens_per_second": options.tokens / milliseconds * 1e3,
        "share_of_peak": rate / peak if peak else None,
        "peak_source": source,
        "tflops": rate / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None,
        "step_ms": milliseconds,
        "split_ms": profile_step(step, device, milliseconds),
    }


def _milliseconds(step: Step, device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def _starts(options: argparse.Namespace) -> torch.Tensor:
    return torch.tensor(random_starts(options.mean_document, options.tokens))


def _flops(variant: str, options: argparse.Namespace) -> int:
    lengths = torch.tensor([options.tokens])
    if variant == "documents":
        lengths = torch.cat([_starts(options), lengths]).diff()
    return training_flops(config(variant, options).model, options.vocab, lengths)


def config(variant: str, options: argparse.Namespace) -> Config:
    """Return the config of one of this program's variants."""
    return Config(
        model=ModelConfig(
            num_layers=options.layers,
            hidden_size=options.hidden,
            num_attention_heads=options.heads,
            ffn_hidden_size=options.ffn,
        ),
        parallel=ParallelConfig(context_parallel="striped"),
        data=DataConfig(seq_length=options.tokens, reset_attention_mask=variant == "documents"),
        training=TrainingConfig(
            train_iters=100,
            dtype=options.dtype,
            zero_stage=1,
            fused_operations="torch" if variant == "torch" else "auto",
        ),
        memory=MemoryConfig(recompute=options.recompute),
    )


def _own_step(variant: str, options: argparse.Namespace) -> Step:
    # DeepSpeed is imported in this process only.
    from benchmarks.training_steps import Trainer
    from megatron_ring.engine.deepspeed_groups import start_processes
    from megatron_ring.model import initialization
    from megatron_ring.parallel.environment import Environment
    from megatron_ring.settings.run_settings import RunSettings

    start_processes(Environment.read(), device_type())
    setup = RunSettings.resolve(config(variant, options), world_size=1)
    starts = _starts(options) if variant == "documents" else None
    # On a CPU, drawing as many numbers as there are parameters takes longer than all steps.
    with mock.patch.object(initialization, "initialize", _draw_on_device):
        trainer = Trainer(setup, 0, options.vocab, starts)
    trainer.engine.wrap_optimizer_step(lambda: record_function(OPTIMIZER_STEP))
    return trainer.step


@torch.no_grad()
def _draw_on_device(module: torch.nn.Module, config: ModelConfig, *_: Any) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, config.init_method_std)


def _transformers_step(options: argparse.Namespace) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    device = device_type()
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.ffn,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=options.tokens,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(DTYPES[options.dtype])
    model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        ids = torch.randint(options.vocab, (1, options.tokens), device=device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _print_row(row: Row) -> None:
    if "error" in row:
        print(f"{row['variant']:>13}  {row['error']}", flush=True)
        return
    share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.1%}"
    memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    figures = f"{row['tokens_per_second']:>11,.0f}{share:>16}{memory:>10}{row['step_ms']:>9.0f}"
    split = "".join(f"{row['split_ms'][name]:>17.1f}" for name in CATEGORIES)
    print(f"{row['variant']:>13}{figures}{split}", flush=True)


if __name__ == "__main__":
    with reporting_errors():
        main()
