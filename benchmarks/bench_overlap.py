"""Time the ring's hops without messages, its messages without hops, and both together, over links of several speeds.

    python -m benchmarks.slow_link python -m benchmarks.bench_overlap --json F
    python -m benchmarks.slow_link \\
        python -m benchmarks.bench_overlap --tokens 4096 --kv-heads 2 --layout ring --rounds 15
    torchrun --nproc-per-node 2 -m benchmarks.bench_overlap --ratios

On CPUs, by gloo, a thread to a rank. Three runs of the ring loop, forward and backward, take turns:

- compute: every rank keeps what it would send, as over a link that is infinitely fast and costs nothing.
- communication: the same messages in the same order, around a kernel that does nothing.
- together: as training does it.

With --ratios every rank limits what it sends (tc, token bucket), so that communication should take so many times
compute; the first row, "none", is the link without a limit. All take turns within each round, and medians are told.

"exposed" is together less compute, as a share of together. Some of it no link could mend, for copying messages takes
the CPU from the kernels; "waited" is the share of together for which a rank stands still, the mean over the ranks.
"needs" is the fewest tokens of a rank that hide a hop's messages, forward and backward, by the operations and bytes a
second that were measured (benchmarks/overlap_criterion.py).
"""

import functools
import itertools
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import tyro

from benchmarks.common import DTYPES, write_json
from benchmarks.overlap_criterion import CAUSAL, Hop, operations
from benchmarks.slow_link import CARD, limited
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.counted import BACKWARD_PRODUCTS, FORWARD_PRODUCTS
from megatron_ring.context_parallel.layout import Layout, auto_stripe_size
from megatron_ring.context_parallel.ring import Exchange, Ring, Transfer
from megatron_ring.context_parallel.traffic import backward_bytes
from megatron_ring.errors import ConfigError, not_positive, reporting_errors
from megatron_ring.kernels.attention import (
    KERNELS,
    HopKernel,
    choose,
    stripe_widths,
    to_kernel_layout,
)
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.grid import Grid
from megatron_ring.plan.timeline import counted


@dataclass(frozen=True)
class Options:
    tokens: tuple[int, ...] = (2048, 4096, 8192)
    """Tokens of a rank."""
    ratios: tuple[float, ...] = (0.25, 0.5, 0.8, 1.25, 2.5)
    """What communication should take, over compute; none: the link is left as it is."""
    layout: Literal["ring", "striped", "zigzag"] = "striped"
    """Who has which token; striped with the stripes of a training run."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 8
    """Key-value heads."""
    head_dim: int = 64
    """Size of a head."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the tensors."""
    attention_kernel: Literal["auto", "sdpa", "reference"] = "auto"
    """What computes a hop."""
    rounds: int = 9
    """Timed rounds, after one that warms up."""
    card: str = CARD
    """The network card that is limited, in a namespace that is this rank's alone."""
    json: str = ""
    """Write the results to this file too."""


class Seconds(NamedTuple):
    """Of a run: the slowest rank's, but for ``waited``, the mean of all ranks."""

    forward: float
    backward: float
    both: float
    waited: float


@dataclass(frozen=True)
class Row:
    """What was measured at a limit of ``mbit``, None: without one. Pairs are forward and backward.

    Seconds; shares of together; bytes and operations a second; tokens of a rank.
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
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    exchange = RingExchange.over(
        ProcessGroups.build(Grid(ring=dist.get_world_size()), dist.get_rank()).ring_links
    )
    load = [os.getloadavg()[0]]
    rows = [row for tokens in options.tokens for row in _rows(options, tokens, exchange)]
    load.append(os.getloadavg()[0])
    if dist.get_rank() == 0:
        _tell(options, rows, load)
    dist.barrier()
    dist.destroy_process_group()


def _check(options: Options) -> None:
    wrong = not_positive(options, "heads", "kv_heads", "head_dim", "rounds")
    wrong += [
        f"tokens {tokens} must be at least 1. Set --tokens."
        for tokens in options.tokens
        if tokens < 1
    ]
    wrong += [
        f"ratio {ratio} must be above 0. Set --ratios." for ratio in options.ratios if not ratio > 0
    ]
    if Environment.read().world_size < 2:
        wrong.append(
            "a ring of one rank sends nothing. Start it with benchmarks.slow_link, or with torchrun and two ranks."
        )
    if wrong:
        raise ConfigError(wrong)


# ---- one ring loop, three runs ----


@dataclass(frozen=True)
class Stays:
    """A transfer to nowhere."""

    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.tensor


@dataclass
class Kept:
    """An exchange in which every rank keeps what it would send. sent: the bytes of that."""

    sent: int = 0

    def start(self, tensor: torch.Tensor, distance: int = 1) -> Stays:
        self.sent += tensor.nbytes
        return Stays(tensor)


class Idle:
    """A kernel that computes nothing."""

    @staticmethod
    def forward(*arguments) -> None:
        """Leaves the softmax as it was."""

    @staticmethod
    def backward(*arguments) -> None:
        """Adds nothing to the gradients."""


@dataclass
class Clocked:
    """An exchange, and the seconds that were waited for what it brings."""

    exchange: Exchange
    waited: float = 0.0

    def start(self, tensor: torch.Tensor, distance: int = 1) -> "ClockedTransfer":
        return ClockedTransfer(self.exchange.start(tensor, distance), self)


@dataclass(frozen=True)
class ClockedTransfer:
    transfer: Transfer
    clock: Clocked

    def wait(self) -> torch.Tensor:
        start = time.perf_counter()
        tensor = self.transfer.wait()
        self.clock.waited += time.perf_counter() - start
        return tensor


@dataclass(frozen=True)
class Shard:
    """The tensors of a rank, and its place in the ring."""

    q: torch.Tensor
    kv: torch.Tensor
    dout: torch.Tensor
    layout: Layout
    kernel: HopKernel

    @staticmethod
    def of(options: Options, tokens: int) -> "Shard":
        heads, groups, size = options.heads, options.kv_heads, options.head_dim
        shapes = (1, tokens, heads, size), (2, 1, tokens, groups, size), (1, tokens, heads, size)
        kernel = choose(options.attention_kernel, "cpu", DTYPES[options.dtype], size).name
        q, kv, dout = (torch.randn(shape).to(DTYPES[options.dtype]) for shape in shapes)
        return Shard(
            to_kernel_layout(kernel, q),
            to_kernel_layout(kernel, kv),
            dout,
            _layout(options.layout, tokens, kernel),
            KERNELS[kernel],
        )

    def run(self, kernel: HopKernel, exchange: Exchange) -> Seconds:
        """Forward and backward from a common start."""
        clocked = Clocked(exchange)
        ring = Ring(self.layout, dist.get_rank(), kernel, self.q.shape[-1] ** -0.5, clocked)
        dist.barrier()
        start = time.perf_counter()
        out, lse = ring_loop.forward(self.q, self.kv, ring)
        middle = time.perf_counter()
        ring_loop.backward(self.dout, None, self.q, self.kv, out, lse, ring)
        end = time.perf_counter()
        return _of_all(Seconds(middle - start, end - middle, end - start, clocked.waited))

    @functools.cached_property
    def sent(self) -> int:
        """Bytes that this rank sends in a run."""
        kept = Kept()
        self.run(Idle, kept)
        return kept.sent

    def runs(self, exchange: Exchange) -> dict[str, Callable[[], Seconds]]:
        return {
            "compute": lambda: self.run(self.kernel, Kept()),
            "communication": lambda: self.run(Idle, exchange),
            "together": lambda: self.run(self.kernel, exchange),
        }


def _layout(name: str, tokens: int, kernel: str) -> Layout:
    ring_size = dist.get_world_size()
    length = tokens * ring_size
    stripe = auto_stripe_size(length, ring_size, stripe_widths(kernel, "cpu"), packed=False)
    return Layout(name, length, ring_size, stripe if name == "striped" else 1)


def _of_all(own: Seconds) -> Seconds:
    ranks = [torch.empty(len(own), dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, torch.tensor(own, dtype=torch.float64))
    of_ranks = torch.stack(ranks)
    return Seconds(*of_ranks.max(dim=0).values.tolist()[:-1], of_ranks.mean(dim=0)[-1].item())


# ---- links of several speeds ----


def _rows(options: Options, tokens: int, exchange: Exchange) -> list[Row]:
    shard = Shard.of(options, tokens)
    runs = shard.runs(exchange)
    limits = [None, *_limits(shard.sent, runs["compute"], options.ratios)]
    seconds = {limit: [] for limit in limits}
    for turn in range(options.rounds + 1):
        for limit in _from(turn, limits):
            if options.ratios:
                _set_limit(limit, options.card)
            runs["communication"]()  # lets TCP find out how fast the link is now
            seconds[limit].append({name: runs[name]() for name in _from(turn, list(runs))})
    return [_row(options, shard, limit, rounds[1:]) for limit, rounds in seconds.items()]


def _limits(sent: int, compute: Callable[[], Seconds], ratios: Sequence[float]) -> list[float]:
    """Megabits a second at which ``sent`` takes so many times what ``compute`` does; the same on every rank."""
    compute()  # the first is slow
    seconds = statistics.median(compute().both for _ in range(3))
    return [sent * 8 / (ratio * seconds) / 1e6 for ratio in ratios]


def _set_limit(mbit: float | None, card: str) -> None:
    subprocess.run(limited(mbit, card), check=True)
    dist.barrier()


T = TypeVar("T")


def _from(turn: int, items: Sequence[T]) -> Iterator[T]:
    """All of them, another one first in each turn: a run inherits caches and heat from the one before it."""
    return itertools.islice(
        itertools.cycle(items), turn % len(items), turn % len(items) + len(items)
    )


def _row(
    options: Options, shard: Shard, mbit: float | None, rounds: list[dict[str, Seconds]]
) -> Row:
    def median(of: Callable[[Seconds, Seconds, Seconds], float]) -> float:
        return statistics.median(of(**each) for each in rounds)

    directions = [
        median(lambda compute, **_: compute.forward),
        median(lambda compute, **_: compute.backward),
    ]
    communication = median(lambda communication, **_: communication.both)
    flops_per_second, needs = _criterion(options, shard, directions, shard.sent / communication)
    return Row(
        tokens=len(shard.q[0]),
        mbit=mbit,
        compute=median(lambda compute, **_: compute.both),
        communication=communication,
        together=median(lambda together, **_: together.both),
        over_max=median(
            lambda compute, communication, together: (
                together.both / max(compute.both, communication.both)
            )
        ),
        exposed=median(lambda compute, together, **_: 1 - compute.both / together.both),
        waited=median(lambda together, **_: together.waited / together.both),
        bytes_per_second=shard.sent / communication,
        flops_per_second=flops_per_second,
        needs=needs,
        can_hide=max(needs) <= len(shard.q[0]),
    )


def _criterion(
    options: Options, shard: Shard, seconds: Sequence[float], bytes_per_second: float
) -> tuple[list[float], list[float]]:
    """The kernel's operations a second and the fewest tokens that hide every hop's messages, forward and backward.

    Messages travel from the first hop on, in which every layout sees half of the square.
    """
    a_pair = [
        operations(each, options.heads, options.head_dim)
        for each in (FORWARD_PRODUCTS, BACKWARD_PRODUCTS)
    ]
    pairs = counted(shard.layout).critical_path
    rates = [work * pairs / spent for work, spent in zip(a_pair, seconds)]
    sent = shard.kv.nbytes, min(backward_bytes(shard.q, shard.kv).values())
    hops = [Hop(work * CAUSAL, each / len(shard.q[0])) for work, each in zip(a_pair, sent)]
    return rates, [hop.shortest_shard(rate, bytes_per_second) for hop, rate in zip(hops, rates)]


# ---- what is told ----

# By the field of a row: its title, width and digits.
_COLUMNS = {
    "tokens": ("tokens", 7, 0),
    "mbit": ("Mbit/s", 8, 0),
    "compute": ("compute", 9, 3),
    "communication": ("communication", 15, 3),
    "together": ("together", 10, 3),
    "over_max": ("over max", 10, 3),
    "exposed": ("exposed", 9, 3),
    "waited": ("waited", 8, 3),
}


def _tell(options: Options, rows: list[Row], load: list[float]) -> None:
    print(f"CPU, {options.dtype}, {dist.get_world_size()} ranks, {options.layout}, {options.heads} heads of "
          f"{options.head_dim}, {options.kv_heads} key-value heads, median of {options.rounds} rounds, load "
          f"{load[0]:.1f} before, {load[1]:.1f} behind")  # fmt: skip
    titles = "".join(f"{title:>{width}}" for title, width, _ in _COLUMNS.values())
    print(f"{titles}{'needs':>14}  can hide")
    print("\n".join(_line(row) for row in rows))
    findings = {"ranks": dist.get_world_size(), "load": load, "options": vars(options)}
    findings["rows"] = [vars(row) for row in rows]
    write_json(options.json, findings)


def _line(row: Row) -> str:
    cells = [(getattr(row, field), width, digits) for field, (_, width, digits) in _COLUMNS.items()]
    shown = "".join(
        f"{'none' if v is None else format(v, f'.{digits}f'):>{width}}"
        for v, width, digits in cells
    )
    needs = " + ".join(f"{tokens:.0f}" for tokens in row.needs)
    return f"{shown}{needs:>14}  {'yes' if row.can_hide else 'no'}"


if __name__ == "__main__":
    with reporting_errors():
        main()
