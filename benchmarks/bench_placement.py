"""Time placed documents beside stripes, over a link that slows the stripes down by a given factor.

    python -m benchmarks.slow_link python -m benchmarks.bench_placement
    python -m benchmarks.slow_link \\
        python -m benchmarks.bench_placement --documents histogram --seq-length 32768

Runs on CPUs with gloo and one thread per rank: attention over one packed sample, forward and
backward, with and without --document-placement auto. With separate documents both send only the
rows that another rank needs. First the link's limit is searched at which stripes take
--slowdown times as long as over the unlimited link; then both are timed, over both links, in
alternation. Medians of rounds are reported, and of the ratios within rounds.
"""

import os
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import tyro

from benchmarks.attention_times import seconds_on_all_ranks
from benchmarks.bench_overlap import set_limit
from benchmarks.common import (
    Column,
    check_outputs,
    legend,
    plain_row,
    plain_titles,
    size_problems,
    write_json,
)
from benchmarks.document_histogram import pack_starts
from benchmarks.slow_link import INTERFACE
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import DocumentPlacement, Layout, auto_stripe_size
from megatron_ring.context_parallel.placement import place_samples
from megatron_ring.errors import ConfigError, counted, reporting_errors
from megatron_ring.kernels.attention import choose, stripe_widths
from megatron_ring.kernels.attention.measured import MaskKind
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.grid import Grid

STRIPES, PLACED = "stripes", "placed"
_LOWEST_MBIT, _HIGHEST_MBIT = 5.0, 5000.0
_SEARCH_STEPS = 8


@dataclass(frozen=True)
class Options:
    seq_length: int = 16384
    """Tokens of the sample, over all ranks."""
    documents: str = "equal:2048"
    """Lengths of documents: equal:N; histogram or histogram:FILE; or N, the mean of lognormal
    lengths."""
    slowdown: float = 1.5
    """Time of the stripes over the limited link, over their time without a limit, to aim for."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 8
    """Key-value heads."""
    head_dim: int = 64
    """Head dim."""
    rounds: int = 7
    """Timed rounds, after one warm-up round."""
    interface: str = INTERFACE
    """Network interface to limit; it must be in a network namespace of this rank alone."""
    json: str = ""
    """Also write the results to this file."""


class Times(NamedTuple):
    """Seconds of one round over one link, of the slowest rank."""

    stripes: float
    placed: float


COLUMNS = {
    "mbit": Column("Mbit/s", 8, 0),
    "stripes": Column("stripes", 9, 3, "seconds with stripes"),
    "placed": Column("placed", 9, 3, "seconds with placed documents"),
    "over_placed": Column("faster", 8, 2, "stripes over placed"),
    "slowdown": Column("slowdown", 10, 2, "stripes over stripes on the unlimited link"),
}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    check_outputs(json=options.json)
    starts = torch.tensor(_check(options))
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    runs, stripe_size = _runs(options, starts)
    limits = [None, _find_limit(options, runs[STRIPES])]
    rounds = _measure(options, runs, limits)
    if dist.get_rank() == 0:
        _report(options, stripe_size, limits, rounds)
    dist.barrier()
    dist.destroy_process_group()


def _check(options: Options) -> tuple[int, ...]:
    """Return where the sample's documents begin; raises ConfigError for bad options."""
    problems = size_problems(options, "seq_length", "head_dim", "rounds")
    if not options.slowdown > 1:
        problems.append(f"slowdown {options.slowdown} must be above 1. Set --slowdown.")
    ranks = Environment.read().world_size
    if ranks < 2:
        problems.append(
            "a ring of 1 rank sends nothing; at least 2 ranks are needed. Start this program with "
            "benchmarks.slow_link."
        )
    elif options.seq_length % ranks:
        problems.append(
            f"seq_length {options.seq_length} must be a multiple of the {ranks} ranks. "
            "Set --seq-length."
        )
    if problems:
        raise ConfigError(problems)
    return pack_starts(options.documents, options.seq_length)


def _runs(options: Options, starts: torch.Tensor) -> tuple[dict[str, Callable[[], None]], int]:
    """Return a run of attention for each layout, and the size of the stripes."""
    ranks = dist.get_world_size()
    kernel = choose("auto", "cpu", torch.float32, options.head_dim).name
    widths = stripe_widths(kernel, "cpu", MaskKind.SPARSE).widths
    stripe_size = auto_stripe_size(options.seq_length, ranks, widths, packed=True)
    stripes = Layout("striped", options.seq_length, ranks, stripe_size)
    placing = replace(stripes, placement=DocumentPlacement())
    if place_samples(starts, 1, placing) == (None,):
        raise ConfigError(
            f"documents {options.documents}: stripes are chosen for this sample, so there is no "
            "placement to measure. Set --documents or --seq-length."
        )
    groups = ProcessGroups.build(Grid(ring=ranks), dist.get_rank())
    layouts = {STRIPES: stripes, PLACED: placing}
    runs = {
        name: _attention_run(ContextParallelAttention(layout, kernel, groups), starts, options)
        for name, layout in layouts.items()
    }
    return runs, stripe_size


def _attention_run(
    attention: ContextParallelAttention, starts: torch.Tensor, options: Options
) -> Callable[[], None]:
    *qkv, dout = (
        torch.randn(1, attention.layout.shard_length, heads, options.head_dim)
        for heads in (options.heads, options.kv_heads, options.kv_heads, options.heads)
    )
    inputs = [x.requires_grad_() for x in qkv]

    def run() -> None:
        out, _ = attention(*inputs, document_starts=starts)
        torch.autograd.grad(out, inputs, dout)

    return run


# ---- links ----


def _find_limit(options: Options, run: Callable[[], None]) -> float:
    """Return the limit in megabits per second at which ``run`` takes ``slowdown`` times as long.

    By bisection on a logarithmic scale; the same on every rank, as the times are.
    """
    set_limit(None, options.interface)
    wanted = options.slowdown * _median_seconds(run)
    low, high = _LOWEST_MBIT, _HIGHEST_MBIT
    for _ in range(_SEARCH_STEPS):
        middle = (low * high) ** 0.5
        set_limit(middle, options.interface)
        low, high = (middle, high) if _median_seconds(run) > wanted else (low, middle)
    return (low * high) ** 0.5


def _median_seconds(run: Callable[[], None], times: int = 3) -> float:
    run()  # warm-up: TCP adapts to the speed of the link
    return statistics.median(seconds_on_all_ranks(run, "cpu") for _ in range(times))


def _measure(
    options: Options, runs: dict[str, Callable[[], None]], limits: list[float | None]
) -> dict[float | None, list[Times]]:
    """Return the times of all rounds over each link; a round has every run over every link."""
    rounds: dict[float | None, list[Times]] = {limit: [] for limit in limits}
    for turn in range(options.rounds + 1):
        order = random.Random(turn)  # the same on every rank
        for limit in order.sample(limits, len(limits)):
            set_limit(limit, options.interface)
            seconds = {}
            for name in order.sample(list(runs), len(runs)):
                runs[name]()  # not timed, as above
                seconds[name] = seconds_on_all_ranks(runs[name], "cpu")
            rounds[limit].append(Times(**seconds))
    return {limit: times[1:] for limit, times in rounds.items()}


# ---- report ----


def _report(
    options: Options,
    stripe_size: int,
    limits: list[float | None],
    rounds: dict[float | None, list[Times]],
) -> None:
    rows = [_row(limit, rounds[limit], rounds[None]) for limit in limits]
    print(
        f"CPU, fp32, {dist.get_world_size()} ranks, {options.seq_length:,} tokens, documents "
        f"{options.documents}, {options.heads} heads of {options.head_dim}, {options.kv_heads} "
        f"key-value heads, stripes of {stripe_size}, median of "
        f"{counted(options.rounds, 'round')}, load {os.getloadavg()[0]:.1f}"
    )
    print(plain_titles(COLUMNS))
    for row in rows:
        print(plain_row(COLUMNS, row, missing="none"))
    print(legend(COLUMNS))
    findings = {"options": vars(options), "stripe_size": stripe_size, "rows": rows}
    write_json(options.json, findings)


def _row(
    limit: float | None, rounds: list[Times], unlimited: list[Times]
) -> dict[str, float | None]:
    return {
        "mbit": limit,
        "stripes": statistics.median(times.stripes for times in rounds),
        "placed": statistics.median(times.placed for times in rounds),
        "over_placed": statistics.median(times.stripes / times.placed for times in rounds),
        "slowdown": statistics.median(
            times.stripes / free.stripes for times, free in zip(rounds, unlimited, strict=True)
        ),
    }


if __name__ == "__main__":
    with reporting_errors():
        main()
