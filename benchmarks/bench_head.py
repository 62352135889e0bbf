"""Compare time and memory of the chunked and the unchunked cross-entropy head.

    python -m benchmarks.bench_head --tokens 2048 4096 8192 --chunk-size 1024
    python -m benchmarks.bench_head --dtype bf16 --json F

Both run forward and backward. Unchunked is F.cross_entropy(hidden @ weight.T), in float32 from the
logits on. The two are interleaved, in alternating order, and the median of the rounds' ratios is
reported, so that a drift of the machine's speed affects both alike. Seconds on a CPU are CPU
seconds of this process, so that other load on the machine does not count.

Memory is the peak number of tensor bytes beyond the hidden states, the weight and their gradients.
It is counted by tensors rather than by the allocator, and is therefore the same in every run.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.common import (
    DTYPES,
    MIB,
    check_outputs,
    compute_seconds,
    device_name,
    table_head,
    table_row,
    write_json,
)
from benchmarks.live_memory import LiveMemory
from megatron_ring.errors import ConfigError, counted, not_positive, reporting_errors
from megatron_ring.kernels.cross_entropy import head_loss_sum


@dataclass(frozen=True)
class Options:
    tokens: tuple[int, ...] = (2048, 4096, 8192)
    """Numbers of tokens to measure, one row of the table each."""
    hidden_size: int = 512
    """Hidden size."""
    vocab_size: int = 32768
    """Vocabulary size."""
    chunk_size: int = 1024
    """Tokens per chunk; the logits of one chunk exist at a time."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the hidden states and the weight."""
    rounds: int = 5
    """Timed rounds, after one in which memory is measured."""
    json: str = ""
    """Also write the results to this file."""


@dataclass(frozen=True)
class Result:
    """One row: medians of the seconds, the median ratio of chunked to unchunked, peak bytes."""

    tokens: int
    unchunked_seconds: float
    chunked_seconds: float
    ratio: float
    unchunked_bytes: int
    chunked_bytes: int


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    check_outputs(json=options.json)
    _check(options)
    print(_setting(options))
    print()
    print(table_head(_COLUMNS), flush=True)
    results = []
    for tokens in options.tokens:
        result = _measure(options, tokens)
        results.append(result)
        print(_row(result), flush=True)
    findings = {
        "device": device_name(_device()),
        "options": vars(options),
        "results": [vars(result) for result in results],
    }
    write_json(options.json, findings)


def _check(options: Options) -> None:
    sizes = ("tokens", "hidden_size", "vocab_size", "chunk_size", "rounds")
    if problems := not_positive(options, *sizes):
        raise ConfigError(problems)


# ---- the two heads ----


def _runs(options: Options, tokens: int) -> dict[str, Callable[[], None]]:
    """Return forward and backward of both heads, on the same tensors."""
    generator = torch.Generator().manual_seed(0)
    hidden_BlE = torch.randn(1, tokens, options.hidden_size, generator=generator)
    weight_VE = torch.randn(options.vocab_size, options.hidden_size, generator=generator) * 0.02
    dtype = DTYPES[options.dtype]
    inputs = [x.to(_device(), dtype).requires_grad_() for x in (hidden_BlE, weight_VE)]
    targets_Bl = torch.randint(options.vocab_size, (1, tokens), generator=generator).to(_device())
    heads = {
        "chunked": lambda: head_loss_sum(*inputs, targets_Bl, options.chunk_size),
        "unchunked": lambda: unchunked_loss_sum(*inputs, targets_Bl),
    }
    return {name: _forward_and_backward(head, inputs) for name, head in heads.items()}


def unchunked_loss_sum(hidden_BlE: Tensor, weight_VE: Tensor, targets_Bl: Tensor) -> Tensor:
    """Return the sum of the token losses, computed from the logits of all tokens at once."""
    logits_NV = (hidden_BlE @ weight_VE.T).flatten(0, 1).float()
    return F.cross_entropy(logits_NV, targets_Bl.flatten(), reduction="sum")


def _forward_and_backward(head: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        # A mean, as in training: the gradients of the sum still have to be scaled.
        (head() / 1024).backward()

    return run


# ---- measuring ----


def _measure(options: Options, tokens: int) -> Result:
    runs = _runs(options, tokens)
    peaks = {name: _peak(run) for name, run in runs.items()}
    seconds = {name: [] for name in runs}
    for turn in range(options.rounds):
        for name in sorted(runs, reverse=bool(turn % 2)):
            seconds[name].append(compute_seconds(runs[name], _device()))
    ratios = [c / u for c, u in zip(seconds["chunked"], seconds["unchunked"])]
    return Result(
        tokens=tokens,
        unchunked_seconds=statistics.median(seconds["unchunked"]),
        chunked_seconds=statistics.median(seconds["chunked"]),
        ratio=statistics.median(ratios),
        unchunked_bytes=peaks["unchunked"] - _gradient_bytes(options, tokens),
        chunked_bytes=peaks["chunked"] - _gradient_bytes(options, tokens),
    )


def _peak(run: Callable[[], None]) -> int:
    with LiveMemory() as live:
        run()
    return live.peak


def _gradient_bytes(options: Options, tokens: int) -> int:
    return (tokens + options.vocab_size) * options.hidden_size * DTYPES[options.dtype].itemsize


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- report ----


def _setting(options: Options) -> str:
    return (
        f"{device_name(_device())}, {options.dtype}, hidden size {options.hidden_size:,}, "
        f"vocabulary {options.vocab_size:,}, chunks of {options.chunk_size:,}, "
        f"forward + backward, median of {counted(options.rounds, 'round')}"
    )


_COLUMNS = (
    "tokens",
    "unchunked s",
    "chunked s",
    "chunked / unchunked",
    "unchunked MiB",
    "chunked MiB",
)


def _row(result: Result) -> str:
    cells = [
        f"{result.tokens:,}",
        f"{result.unchunked_seconds:.2f}",
        f"{result.chunked_seconds:.2f}",
        f"{result.ratio:.2f}",
        f"{result.unchunked_bytes / MIB:,.1f}",
        f"{result.chunked_bytes / MIB:,.1f}",
    ]
    return table_row(cells)


if __name__ == "__main__":
    with reporting_errors():
        main()
