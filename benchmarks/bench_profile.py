"""Check what the ring profile costs, and that its hops add up to the time in the ring.

    python -m benchmarks.bench_profile --json bench-profile.json
    torchrun --nproc-per-node 4 -m benchmarks.bench_profile --json bench-profile.json

Needs only torch, and Triton for its kernel, and with torchrun what the package needs except
DeepSpeed; no network. A step runs attention layers forward and
backward in a ring, in three modes:

- off: nothing is recorded.
- stragglers: what --straggler-threshold records, by default in every run with a ring.
- profile: what --profile-ring records.

A round has a step of each mode, in rotating order. The overhead of a mode is the median over rounds
of its step's time over that of the same round's step without recording, minus 1. A step's time ends
when what was recorded has been read. On a GPU an overhead of 2% or more is a failure.

In further steps every pass of the ring is timed by events of this program around it. What the
profile gives to hops, compute and waits, must add up to at most that time (and 2 microseconds a
pass, for rounding), and on a GPU to at least that time less 1% and 20 microseconds a pass.

Without torchrun all ranks are threads of one process and share one GPU; copies within it take the
place of messages (benchmarks/streamed_ring.py). One host then records and reads for all ranks,
which costs it as many times as much as a rank's host: the overhead is an upper bound. With torchrun
every rank is a process, joined by NCCL, or by gloo on a CPU.

The exit code is 0 only if there is no failure. On a CPU the host's clock times everything.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.common import (
    DTYPES,
    check_outputs,
    commit,
    device_name,
    missing_gpu,
    random_inputs,
    ring_problems,
    write_json,
)
from benchmarks.streamed_ring import (
    RecordedExchange,
    StreamExchange,
    Streams,
    on_every_rank,
)
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.hop_cost import with_work_count
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.ring_hop import Exchange
from megatron_ring.errors import ConfigError, counted, reporting_errors
from megatron_ring.kernels.attention import KERNELS, HopKernel, choose
from megatron_ring.monitoring.ring_profile.hop_statistics import sum_log
from megatron_ring.parallel.device_clock import DeviceClock, TimedEvent, cuda_event
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.progress import Direction, ProgressTracker
from megatron_ring.parallel.ring_log import WORK_EVENTS, Event

if TYPE_CHECKING:
    from megatron_ring.parallel.collectives import RingLinks

# What each mode records; None: nothing.
MODES = {"off": None, "stragglers": WORK_EVENTS, "profile": frozenset(Event)}

MAX_OVERHEAD = 0.02
MAX_MISSING = 0.01
MAX_MISSING_PER_PASS = 20e-6
MAX_ROUNDING_PER_PASS = 2e-6

_WARM_UP_ROUNDS = 2
_TIMED_STEPS = 3
_ROWS_PER_HOP = 24


def main() -> None:
    options = _parser().parse_args()
    environment = Environment.read()
    is_distributed = environment.world_size > 1
    if is_distributed:
        options.ranks = environment.world_size
    _check(options)
    if environment.global_rank == 0:
        check_outputs(json=options.json)
    links = _join(options, environment) if is_distributed else None
    bench = Bench.build(options, links)
    findings = bench.measure()
    if environment.global_rank == 0:
        setting = {
            "device": device_name(options.device),
            "torch": torch.__version__,
            "commit": commit(),
            "ranks": "processes" if links else "threads",
            "options": vars(options),
        }
        _print(setting, findings)
        write_json(options.json, setting | findings)
    if is_distributed:
        dist.barrier()
        dist.destroy_process_group()
    raise SystemExit(bool(findings["failures"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranks", type=int, default=4, help="ranks of the ring; with torchrun all its processes"
    )
    parser.add_argument("--layers", type=int, default=4, help="passes forward and back in a step")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per rank")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8, help="key-value heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--kernel", choices=["auto", *KERNELS], default="auto")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds of three steps")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", default="", help="also write the results to this file")
    return parser


def _check(options: argparse.Namespace) -> None:
    problems = ring_problems(options, "layers", "head_dim", "rounds")
    problems += missing_gpu(options.device, "measure what is recorded on a CPU")
    if problems:
        raise ConfigError(problems)


def _join(options: argparse.Namespace, environment: Environment) -> "RingLinks":
    """Join the processes of torchrun in a ring and return its links; blocks."""
    # Imported here because it needs packages that a lent machine may lack.
    from megatron_ring.parallel.collectives import ProcessGroups
    from megatron_ring.parallel.grid import Grid

    backend = "gloo"
    if options.device == "cuda":
        torch.cuda.set_device(environment.local_rank)
        backend = "nccl"
    dist.init_process_group(backend)
    return ProcessGroups.build(Grid(ring=options.ranks), environment.global_rank).ring_links


# ---- one rank ----


@dataclass
class Stopwatch:
    """Times passes of the ring independently of the profile.

    Attributes:
        new_event: Creates an event with timing; None: the host's clock is read.
    """

    new_event: Callable[[], TimedEvent] | None
    _host_seconds: float = 0.0
    _events: list[tuple[TimedEvent, TimedEvent]] = field(default_factory=list)

    @contextlib.contextmanager
    def span(self) -> Iterator[None]:
        if self.new_event is None:
            began = time.perf_counter()
            yield
            self._host_seconds += time.perf_counter() - began
        else:
            begin, end = self.new_event(), self.new_event()
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))

    def seconds(self) -> float:
        """Return the sum of all spans; the device must have been synchronised."""
        return self._host_seconds + sum(b.elapsed_time(e) for b, e in self._events) / 1e3


@dataclass(frozen=True)
class Rank:
    """One rank of the ring: its tensors, and a progress tracker for each mode."""

    ring_rank: int
    q: torch.Tensor
    kv: torch.Tensor
    dout: torch.Tensor
    trackers: dict[str, ProgressTracker]

    def run_layers(self, bench: "Bench", mode: str, exchange: Exchange, watch: Any) -> None:
        """Queue a step: all layers forward and backward, each pass within ``watch()``."""
        tracker = self.trackers[mode]
        ring = ring_loop.Ring(
            layout=bench.layout,
            ring_rank=self.ring_rank,
            kernel=with_work_count(bench.kernel, tracker),
            scale=self.q.shape[-1] ** -0.5,
            exchange=exchange,
            on_hop=tracker.begin_hop,
        )
        for layer in range(bench.layers):
            with watch(), tracker.in_ring(layer, Direction.FORWARD):
                out, lse = ring_loop.forward(self.q, self.kv, ring)
            with watch(), tracker.in_ring(layer, Direction.BACKWARD):
                ring_loop.backward(self.dout, None, self.q, self.kv, out, lse, ring)


class Reading(NamedTuple):
    """What one rank's profile gives for a step, and what the stopwatch measured, in seconds.

    rows: of the log. missed: rows that did not fit.
    """

    compute: float
    wait: float
    ring: float
    rows: int
    missed: int


# ---- all ranks ----


@dataclass(frozen=True)
class Bench:
    """The ranks of this process, and what they run.

    Attributes:
        ranks: All ranks of the ring, or this process's one.
        links: Of the processes of torchrun; None where the ranks are threads.
        new_event: Creates an event with timing; None on a CPU.
        synchronize: Blocks until the device is done.
    """

    layout: Layout
    layers: int
    rounds: int
    kernel: HopKernel
    ranks: list[Rank]
    streams: list[Streams]
    links: "RingLinks | None"
    new_event: Callable[[], TimedEvent] | None
    synchronize: Callable[[], None]

    @staticmethod
    def build(options: argparse.Namespace, links: "RingLinks | None") -> "Bench":
        on_gpu = options.device == "cuda"
        dtype = DTYPES[options.dtype]
        kernel = choose(options.kernel, options.device, dtype, options.head_dim).name
        layout = Layout("striped", options.ranks * options.tokens, options.ranks)
        own_ranks = [dist.get_rank()] if links else range(options.ranks)
        new_event = cuda_event if on_gpu else None
        heads = options.heads, options.kv_heads, options.head_dim
        q, k, v, dout = random_inputs(options.tokens, *heads, options.device, dtype)
        log_rows = _ROWS_PER_HOP * 2 * options.layers * options.ranks
        return Bench(
            layout=layout,
            layers=options.layers,
            rounds=options.rounds,
            kernel=KERNELS[kernel],
            ranks=[
                Rank(rank, q, torch.stack([k, v]), dout, make_trackers(log_rows, new_event))
                for rank in own_ranks
            ],
            streams=[] if links else [Streams.of_device(options.device) for _ in own_ranks],
            links=links,
            new_event=new_event,
            synchronize=torch.cuda.synchronize if on_gpu else lambda: None,
        )

    def measure(self) -> dict[str, Any]:
        """Return overheads, the readings of each rank of this process, and the failures."""
        steps = self._measure_rounds()
        readings = [self._timed_step() for _ in range(_TIMED_STEPS)]
        overhead = {
            mode: statistics.median(step[mode] / step["off"] - 1 for step in steps)
            for mode in MODES
            if mode != "off"
        }
        failures = []
        for of_ranks in readings:
            for rank, reading in zip(self.ranks, of_ranks):
                failures += self._problems(rank.ring_rank, reading)
        if self.new_event is not None:
            failures += [
                f"{mode}: an overhead of {value:.2%} is not below {MAX_OVERHEAD:.0%}"
                for mode, value in overhead.items()
                if not value < MAX_OVERHEAD
            ]
        return {
            "step_seconds": {
                mode: statistics.median(step[mode] for step in steps) for mode in MODES
            },
            "overhead": overhead,
            "rounds": steps,
            "readings": [[reading._asdict() for reading in of_ranks] for of_ranks in readings],
            "failures": self._of_all_processes(failures),
        }

    def _measure_rounds(self) -> list[dict[str, float]]:
        """Return the seconds of a step by mode, for each round after those for warming up."""
        modes = list(MODES)
        rounds = []
        for number in range(_WARM_UP_ROUNDS + self.rounds):
            first = number % len(modes)
            rounds.append({mode: self._step(mode) for mode in modes[first:] + modes[:first]})
        return rounds[_WARM_UP_ROUNDS:]

    def _step(self, mode: str) -> float:
        """Run a step and read what it recorded; return its seconds, of the slowest process."""
        self._barrier()
        began = time.perf_counter()
        self._run(mode, [contextlib.nullcontext] * len(self.ranks))
        for rank in self.ranks:
            sum_log(rank.trackers[mode].end_step(), self.layout.ring_size)
        seconds = time.perf_counter() - began
        return max(self._gathered(seconds))

    def _timed_step(self) -> list[Reading]:
        """Run a profiled step with a stopwatch around every pass; return a reading of each rank."""
        watches = [Stopwatch(self.new_event) for _ in self.ranks]
        self._barrier()
        self._run("profile", [watch.span for watch in watches])
        readings = []
        for rank, watch in zip(self.ranks, watches):
            tracker = rank.trackers["profile"]
            rows = tracker.end_step()
            sums = sum_log(rows, self.layout.ring_size)
            readings.append(
                Reading(
                    compute=float(sums.compute_2R.sum()),
                    wait=float(sums.wait_2R.sum()),
                    ring=watch.seconds(),
                    rows=len(rows),
                    missed=tracker.log.missed,
                )
            )
        return readings

    def _run(self, mode: str, watches: list[Any]) -> None:
        """Run a step on the ranks of this process and synchronise, as a training step does."""

        def on_thread(number: int, exchange: StreamExchange) -> None:
            rank = self.ranks[number]
            tracker = rank.trackers[mode]
            tracker.begin_step()
            recorded = RecordedExchange(exchange, len(self.ranks), tracker)
            rank.run_layers(self, mode, recorded, watches[number])

        if self.links is None:
            on_every_rank(self.streams, on_thread)
        else:
            from megatron_ring.parallel.collectives import RingExchange

            [rank] = self.ranks
            tracker = rank.trackers[mode]
            tracker.begin_step()
            exchange = RingExchange.over(self.links, tracker)
            rank.run_layers(self, mode, exchange, watches[0])
        self.synchronize()

    def _problems(self, ring_rank: int, reading: Reading) -> list[str]:
        """Return how a reading contradicts the stopwatch."""
        hops = reading.compute + reading.wait
        compared = f"rank {ring_rank}: hops add up to {hops:.6f} s of {reading.ring:.6f} s"
        if reading.missed:
            return [f"rank {ring_rank}: {reading.missed} rows did not fit into the log"]
        # An event's time is exact to half a microsecond.
        rounding = MAX_ROUNDING_PER_PASS * 2 * self.layers
        if hops > reading.ring + rounding:
            return [f"{compared}: more than the passes take"]
        may_miss = MAX_MISSING * reading.ring + MAX_MISSING_PER_PASS * 2 * self.layers
        if self.new_event is not None and reading.ring - hops > may_miss:
            return [f"{compared}: more than {may_miss:.6f} s are missing"]
        return []

    def _barrier(self) -> None:
        if self.links:
            dist.barrier()
        self.synchronize()

    def _gathered(self, value: Any) -> list[Any]:
        """Return the values of all processes."""
        if not self.links:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def _of_all_processes(self, failures: list[str]) -> list[str]:
        return [failure for of_process in self._gathered(failures) for failure in of_process]


def make_trackers(
    log_rows: int, new_event: Callable[[], TimedEvent] | None
) -> dict[str, ProgressTracker]:
    """Return a rank's tracker for each mode, as training builds them (ring_profile/monitor.py)."""
    trackers = {"off": ProgressTracker()}
    for mode, logged in MODES.items():
        if logged is not None and new_event is not None:
            trackers[mode] = ProgressTracker.with_work(log_rows, DeviceClock(logged, new_event))
        elif logged is not None:
            trackers[mode] = ProgressTracker.with_work(log_rows if mode == "profile" else 0)
    return trackers


def _print(setting: dict[str, Any], findings: dict[str, Any]) -> None:
    options = setting["options"]
    print(
        f"{setting['device']}, torch {setting['torch']}, {options['ranks']} ranks as "
        f"{setting['ranks']}, {counted(options['layers'], 'layer')}, {options['tokens']} tokens "
        f"a rank, {options['heads']} heads of {options['head_dim']}, {options['kv_heads']} "
        f"key-value heads, {options['dtype']}, median of {counted(options['rounds'], 'round')}"
    )
    for mode, seconds in findings["step_seconds"].items():
        overhead = findings["overhead"].get(mode)
        more = "" if overhead is None else f"  overhead {overhead:+.2%}"
        print(f"{mode:12}step {seconds * 1e3:10.3f} ms{more}")
    for number, reading in enumerate(findings["readings"][-1]):
        hops = reading["compute"] + reading["wait"]
        print(
            f"rank {number}: hops {hops * 1e3:.3f} ms ({reading['wait'] * 1e3:.3f} ms of it waits) "
            f"of {reading['ring'] * 1e3:.3f} ms in the ring, {reading['rows']} rows"
        )
    for failure in findings["failures"]:
        print(f"FAILED  {failure}")


if __name__ == "__main__":
    with reporting_errors():
        main()
