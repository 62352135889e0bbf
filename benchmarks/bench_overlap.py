"""Measure how much of a ring's communication its computation hides, on links of given speeds.

    python -m benchmarks.slow_link python -m benchmarks.bench_overlap --json F
    python -m benchmarks.slow_link \\
        python -m benchmarks.bench_overlap --tokens 4096 --kv-heads 2 --layout ring --rounds 15
    torchrun --nproc-per-node 2 -m benchmarks.bench_overlap --ratios

Runs on CPUs with gloo and one thread per rank. Three runs of the ring loop, forward and backward,
are interleaved:

- compute: every rank keeps what it would send, as if the link were infinitely fast and free.
- communication: the same messages in the same order, with a kernel that does nothing.
- together: both, as in training.

With --ratios every rank limits its sending rate (tc, token bucket) so that communication should
take the given multiple of compute. The first row, "none", is the unlimited link. All settings are
interleaved within each round and medians are reported.

"exposed" is (together - compute) / together. No link could avoid all of it, because copying
messages takes CPU time from the kernels. "waited" is the share of together in which a rank is
blocked, averaged over the ranks. "needs" is the fewest tokens per rank that hide the messages of a
hop, forward and backward, computed from the measured operations and bytes per second
(benchmarks/overlap_criterion.py).
"""

import itertools
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
import tyro

from benchmarks.common import (
    DTYPES,
    Column,
    check_outputs,
    legend,
    plain_row,
    plain_titles,
    random_inputs,
    size_problems,
    write_json,
)
from benchmarks.overlap_criterion import CAUSAL, Hop, operations
from benchmarks.overlap_runs import Seconds, Shard
from benchmarks.slow_link import INTERFACE, limit_command
from megatron_ring.context_parallel.hop_cost import (
    BACKWARD_PRODUCTS,
    FORWARD_PRODUCTS,
    backward_bytes,
)
from megatron_ring.context_parallel.layout import Layout, auto_stripe_size
from megatron_ring.context_parallel.ring_hop import Exchange
from megatron_ring.errors import ConfigError, counted, reporting_errors
from megatron_ring.kernels.attention import (
    KERNELS,
    choose,
    stack_to_kernel_layout,
    stripe_widths,
    to_kernel_layout,
)
from megatron_ring.kernels.attention.measured import MaskKind
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.grid import Grid
from megatron_ring.plan.ring_timeline import visible_pairs_per_hop


@dataclass(frozen=True)
class Options:
    tokens: tuple[int, ...] = (2048, 4096, 8192)
    """Tokens per rank."""
    ratios: tuple[float, ...] = (0.25, 0.5, 0.8, 1.25, 2.5)
    """Communication time over compute time to aim for; empty: leave the link unlimited."""
    layout: Literal["ring", "striped", "zigzag"] = "striped"
    """Layout of the tokens; striped uses the stripe size of a training run."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 8
    """Key-value heads."""
    head_dim: int = 64
    """Head dim."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the tensors."""
    attention_kernel: Literal["auto", "sdpa", "reference"] = "auto"
    """Kernel that computes a hop."""
    rounds: int = 9
    """Timed rounds, after one warm-up round."""
    card: str = INTERFACE
    """Network interface to limit; it must be in a network namespace of this rank alone."""
    json: str = ""
    """Also write the results to this file."""


@dataclass(frozen=True)
class Row:
    """The results for one number of tokens per rank and one limit.

    Attributes:
        tokens: Tokens per rank.
        mbit: The limit in megabits per second; None without one.
        compute, communication, together: Seconds.
        over_max: together over the larger of compute and communication.
        exposed, waited: Shares of together.
        flops_per_second: Operations per second, forward and backward.
        needs: Tokens per rank that hide a hop's messages, forward and backward.
        can_hide: Whether ``tokens`` is at least as many.
    """

    tokens: int
    mbit: float | None
    compute: float
    communication: float
    together: float
    over_max: float
    exposed: float
    waited: float
    bytes_per_second: float
    flops_per_second: list[float]
    needs: list[float]
    can_hide: bool


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    _check(options)
    if Environment.read().global_rank == 0:
        check_outputs(json=options.json)
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    groups = ProcessGroups.build(Grid(ring=dist.get_world_size()), dist.get_rank())
    exchange = RingExchange.over(groups.ring_links)
    load_before = os.getloadavg()[0]
    rows = [row for tokens in options.tokens for row in _measure(options, tokens, exchange)]
    load_after = os.getloadavg()[0]
    if dist.get_rank() == 0:
        _report(options, rows, [load_before, load_after])
    dist.barrier()
    dist.destroy_process_group()


def _check(options: Options) -> None:
    problems = size_problems(options, "tokens", "head_dim", "rounds")
    for ratio in options.ratios:
        if not ratio > 0:
            problems.append(f"ratio {ratio} must be above 0. Set --ratios.")
    if Environment.read().world_size < 2:
        problems.append(
            "a ring of 1 rank sends nothing; at least 2 ranks are needed. Start this program with "
            "benchmarks.slow_link, or with torchrun --nproc-per-node 2."
        )
    if problems:
        raise ConfigError(problems)


# ---- links of several speeds ----


def _measure(options: Options, tokens: int, exchange: Exchange) -> list[Row]:
    shard = _shard(options, tokens)
    runs = shard.runs(exchange)
    limits = [None, *_limits(shard.sent, runs["compute"], options.ratios)]
    rounds = {limit: [] for limit in limits}
    for turn in range(options.rounds + 1):
        for limit in _rotated(limits, turn):
            if options.ratios:
                set_limit(limit, options.card)
            runs["communication"]()  # not timed: TCP adapts to the new speed of the link
            rounds[limit].append({name: runs[name]() for name in _rotated(list(runs), turn)})
    return [_row(options, shard, limit, timed[1:]) for limit, timed in rounds.items()]


def _shard(options: Options, tokens: int) -> Shard:
    dtype = DTYPES[options.dtype]
    kernel = choose(options.attention_kernel, "cpu", dtype, options.head_dim).name
    heads = (options.heads, options.kv_heads, options.head_dim)
    q, k, v, dout = random_inputs(tokens, *heads, "cpu", dtype)
    return Shard(
        to_kernel_layout(kernel, q),
        stack_to_kernel_layout(kernel, [k, v]),
        dout,
        _layout(options.layout, tokens, kernel),
        KERNELS[kernel],
    )


def _layout(name: str, tokens: int, kernel: str) -> Layout:
    ring_size = dist.get_world_size()
    length = tokens * ring_size
    widths = stripe_widths(kernel, "cpu", MaskKind.CAUSAL).widths
    stripe = auto_stripe_size(length, ring_size, widths, packed=False)
    return Layout(name, length, ring_size, stripe if name == "striped" else 1)


def _limits(sent: int, compute: Callable[[], Seconds], ratios: Sequence[float]) -> list[float]:
    """Return the limit in megabits per second for each ratio; the same on every rank.

    At that limit, sending ``sent`` bytes takes ``ratio`` times as long as ``compute``.
    """
    compute()  # warm-up
    seconds = statistics.median(compute().both for _ in range(3))
    return [sent * 8 / (ratio * seconds) / 1e6 for ratio in ratios]


def set_limit(mbit: float | None, interface: str) -> None:
    """Limit what this rank sends, in megabits per second; None removes the limit. Blocks."""
    subprocess.run(limit_command(mbit, interface), check=True)
    dist.barrier()


T = TypeVar("T")


def _rotated(items: Sequence[T], turn: int) -> Iterator[T]:
    """Yield all items, starting with another one each turn.

    A run inherits caches and heat from the one before it.
    """
    first = turn % len(items)
    return itertools.islice(itertools.cycle(items), first, first + len(items))


def _row(
    options: Options, shard: Shard, mbit: float | None, rounds: list[dict[str, Seconds]]
) -> Row:
    def median(figure: Callable[[Seconds, Seconds, Seconds], float]) -> float:
        """Return the median over rounds of ``figure(compute, communication, together)``."""
        return statistics.median(
            figure(of_round["compute"], of_round["communication"], of_round["together"])
            for of_round in rounds
        )

    tokens = len(shard.q[0])
    compute_seconds = [median(lambda c, m, t: c.forward), median(lambda c, m, t: c.backward)]
    communication = median(lambda c, m, t: m.both)
    bytes_per_second = shard.sent / communication
    flops_per_second = _flops_per_second(options, shard, compute_seconds)
    needs = _needed_tokens(options, shard, flops_per_second, bytes_per_second)
    return Row(
        tokens=tokens,
        mbit=mbit,
        compute=median(lambda c, m, t: c.both),
        communication=communication,
        together=median(lambda c, m, t: t.both),
        over_max=median(lambda c, m, t: t.both / max(c.both, m.both)),
        exposed=median(lambda c, m, t: 1 - c.both / t.both),
        waited=median(lambda c, m, t: t.waited / t.both),
        bytes_per_second=bytes_per_second,
        flops_per_second=flops_per_second,
        needs=needs,
        can_hide=max(needs) <= tokens,
    )


def _operations_per_pair(options: Options) -> list[int]:
    """Return the operations per visible pair, forward and backward."""
    return [
        operations(products, options.heads, options.head_dim)
        for products in (FORWARD_PRODUCTS, BACKWARD_PRODUCTS)
    ]


def _flops_per_second(options: Options, shard: Shard, seconds: Sequence[float]) -> list[float]:
    """Return the kernel's operations per second, forward and backward."""
    pairs = visible_pairs_per_hop(shard.layout).lockstep_time
    per_pair = _operations_per_pair(options)
    return [work * pairs / spent for work, spent in zip(per_pair, seconds)]


def _needed_tokens(
    options: Options, shard: Shard, flops_per_second: Sequence[float], bytes_per_second: float
) -> list[float]:
    """Return the fewest tokens per rank that hide a hop's messages, forward and backward.

    Messages travel from the first hop on, in which the causal mask leaves half of the square.
    """
    tokens = len(shard.q[0])
    sent = [shard.kv.nbytes, min(backward_bytes(shard.q, shard.kv).values())]
    needs = []
    for work, nbytes, rate in zip(_operations_per_pair(options), sent, flops_per_second):
        hop = Hop(work * CAUSAL, nbytes / tokens)
        needs.append(hop.shortest_shard(rate, bytes_per_second))
    return needs


# ---- report ----

# By field of Row.
_COLUMNS = {
    "tokens": Column("tokens", 7, 0),
    "mbit": Column("Mbit/s", 8, 0),
    "compute": Column("compute", 9, 3, "seconds of the hops, nothing sent"),
    "communication": Column("communication", 15, 3, "seconds of the messages, nothing computed"),
    "together": Column("together", 10, 3, "seconds of the ring"),
    "over_max": Column("over max", 10, 3, "together over the larger of the two"),
    "exposed": Column("exposed", 9, 3, "(together - compute) / together"),
    "waited": Column(
        "waited", 8, 3, "share of the time in which a rank is idle, mean of the ranks"
    ),
}


def _report(options: Options, rows: list[Row], load: list[float]) -> None:
    """Print the table and write the JSON file. load: the machine's load before and after."""
    ranks = dist.get_world_size()
    print(
        f"CPU, {options.dtype}, {ranks} ranks, {options.layout}, {options.heads} heads of "
        f"{options.head_dim}, {options.kv_heads} key-value heads, "
        f"median of {counted(options.rounds, 'round')}, load {load[0]:.1f} before, {load[1]:.1f} "
        "after"
    )
    print(f"{plain_titles(_COLUMNS)}{'needs':>14}  can hide")
    for row in rows:
        print(_line(row))
    print(legend(_COLUMNS))
    print("  needs: tokens per rank that hide the messages of a hop, forward + backward")
    print("  can hide: whether there are at least as many tokens as the larger of the two")
    findings = {
        "ranks": ranks,
        "load": load,
        "options": vars(options),
        "rows": [vars(row) for row in rows],
    }
    write_json(options.json, findings)


def _line(row: Row) -> str:
    needs = " + ".join(f"{tokens:.0f}" for tokens in row.needs)
    cells = plain_row(_COLUMNS, vars(row), missing="none")
    return f"{cells}{needs:>14}  {'yes' if row.can_hide else 'no'}"


if __name__ == "__main__":
    with reporting_errors():
        main()
