"""Time the fused, chunked head and cross entropy beside the unchunked one, forward and backward, and weigh both.

    python -m benchmarks.bench_head --tokens 2048 4096 8192 --chunk-size 1024
    python -m benchmarks.bench_head --dtype bf16 --json F

Unchunked is F.cross_entropy(hidden @ weight.T), in float32 from the logits on. The two take turns within each round,
another one first each time, and the median of the rounds' ratios is reported, so that a drift of the machine meets both
alike. On a CPU the seconds are those that this process computed, so that what else runs there is not counted.

Weighed are, at the fullest moment, the bytes of the tensors that exist beyond the hidden states, the weight and the
gradients of the two: by tensors, not by the allocator, so that every run weighs the same.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.common import DTYPES, MIB, device_name, table_row, write_json
from benchmarks.live_memory import LiveMemory
from megatron_ring.errors import ConfigError, not_positive, reporting_errors
from megatron_ring.kernels.cross_entropy import head_loss_sum


@dataclass(frozen=True)
class Options:
    tokens: tuple[int, ...] = (2048, 4096, 8192)
    """Numbers of tokens, one row of the table each."""
    hidden_size: int = 512
    """Width of the hidden states."""
    vocab_size: int = 32768
    """Rows of the head's matrix."""
    chunk_size: int = 1024
    """Tokens whose logits exist at a time."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the hidden states and the weight."""
    rounds: int = 5
    """Timed rounds, after one that warms up and is weighed."""
    json: str = ""
    """Write the results to this file too."""


@dataclass(frozen=True)
class Result:
    """One row: a number of tokens, both heads' median seconds, the median of chunked over unchunked, both's bytes."""

    tokens: int
    unchunked_seconds: float
    chunked_seconds: float
    ratio: float
    unchunked_bytes: int
    chunked_bytes: int


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    _check(options)
    print(
        "\n".join(
            [_setting(options), "", table_row(_COLUMNS), table_row("---:" for _ in _COLUMNS)]
        ),
        flush=True,
    )
    results = []
    for tokens in options.tokens:
        results.append(_result(options, tokens))
        print(_row(results[-1]), flush=True)
    findings = {
        "device": device_name(_device()),
        "options": vars(options),
        "results": [vars(result) for result in results],
    }
    write_json(options.json, findings)


def _check(options: Options) -> None:
    names = ("hidden_size", "vocab_size", "chunk_size", "rounds")
    wrong = not_positive(options, *names)
    wrong += [
        f"tokens {tokens} must be at least 1. Set --tokens."
        for tokens in options.tokens
        if tokens < 1
    ]
    if wrong:
        raise ConfigError(wrong)


# ---- what runs ----


def _result(options: Options, tokens: int) -> Result:
    runs = _contenders(options, tokens)
    peaks = {name: _peak(run) for name, run in runs.items()}
    seconds = {name: [] for name in runs}
    for turn in range(options.rounds):
        for name in sorted(runs, reverse=bool(turn % 2)):
            seconds[name].append(_seconds(runs[name]))
    return Result(
        tokens=tokens,
        unchunked_seconds=statistics.median(seconds["unchunked"]),
        chunked_seconds=statistics.median(seconds["chunked"]),
        ratio=statistics.median(c / u for c, u in zip(seconds["chunked"], seconds["unchunked"])),
        unchunked_bytes=peaks["unchunked"] - _gradient_bytes(options, tokens),
        chunked_bytes=peaks["chunked"] - _gradient_bytes(options, tokens),
    )


def _contenders(options: Options, tokens: int) -> dict[str, Callable[[], None]]:
    """Both heads, forward and backward, on the same tensors."""
    random = torch.Generator().manual_seed(0)
    hidden_BlE = torch.randn(1, tokens, options.hidden_size, generator=random)
    weight_VE = torch.randn(options.vocab_size, options.hidden_size, generator=random) * 0.02
    inputs = [
        x.to(_device(), DTYPES[options.dtype]).requires_grad_() for x in (hidden_BlE, weight_VE)
    ]
    targets_Bl = torch.randint(options.vocab_size, (1, tokens), generator=random).to(_device())
    heads = {
        "chunked": lambda: head_loss_sum(*inputs, targets_Bl, options.chunk_size),
        "unchunked": lambda: unchunked_loss_sum(*inputs, targets_Bl),
    }
    return {name: _both_ways(head, inputs) for name, head in heads.items()}


def unchunked_loss_sum(hidden_BlE: Tensor, weight_VE: Tensor, targets_Bl: Tensor) -> Tensor:
    """What head_loss_sum is compared with."""
    logits_NV = (hidden_BlE @ weight_VE.T).flatten(0, 1).float()
    return F.cross_entropy(logits_NV, targets_Bl.flatten(), reduction="sum")


def _both_ways(head: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        (
            head() / 1024
        ).backward()  # a mean, as in training: the sum's gradients still have to be scaled

    return run


# ---- how it is measured ----


def _peak(run: Callable[[], None]) -> int:
    with LiveMemory() as live:
        run()
    return live.peak


def _gradient_bytes(options: Options, tokens: int) -> int:
    return (tokens + options.vocab_size) * options.hidden_size * DTYPES[options.dtype].itemsize


def _seconds(run: Callable[[], None]) -> float:
    start = _clock()
    run()
    return _clock() - start


def _clock() -> float:
    """Seconds: of this process's own work on a CPU, and on a GPU once that has done its own."""
    if _device() == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- what is told ----


def _setting(options: Options) -> str:
    return (
        f"{device_name(_device())}, {options.dtype}, hidden size {options.hidden_size:,}, "
        f"vocabulary {options.vocab_size:,}, "
        f"chunks of {options.chunk_size:,}, forward + backward, median of {options.rounds} rounds"
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
    seconds = [
        f"{value:.2f}" for value in (result.unchunked_seconds, result.chunked_seconds, result.ratio)
    ]
    weights = [f"{value / MIB:,.1f}" for value in (result.unchunked_bytes, result.chunked_bytes)]
    return table_row([f"{result.tokens:,}", *seconds, *weights])


if __name__ == "__main__":
    with reporting_errors():
        main()
