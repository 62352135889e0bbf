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
import statistics
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from benchmarks.common import (
    DTYPES,
    check_outputs,
    commit,
    device_name,
    missing_gpu,
    ring_problems,
    write_json,
)
from benchmarks.recorded_ring import MODES, Reading, RecordedRing
from megatron_ring.errors import ConfigError, counted, reporting_errors
from megatron_ring.kernels.attention import KERNELS
from megatron_ring.parallel.environment import Environment

if TYPE_CHECKING:
    from megatron_ring.parallel.collectives import RingLinks

MAX_OVERHEAD = 0.02
MAX_MISSING = 0.01
MAX_MISSING_PER_PASS = 20e-6
MAX_ROUNDING_PER_PASS = 2e-6

_WARM_UP_ROUNDS = 2
_TIMED_STEPS = 3


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
    findings = measure(RecordedRing.build(options, links), options.rounds)
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


# ---- the measurement and its verdict ----


def measure(ring: RecordedRing, rounds: int) -> dict[str, Any]:
    """Return overheads, the readings of each rank of this process, and the failures."""
    steps = _measure_rounds(ring, rounds)
    readings = [ring.timed_step() for _ in range(_TIMED_STEPS)]
    overhead = {
        mode: statistics.median(step[mode] / step["off"] - 1 for step in steps)
        for mode in MODES
        if mode != "off"
    }
    failures = []
    for of_ranks in readings:
        for rank, reading in zip(ring.ranks, of_ranks):
            failures += _problems(ring, rank.ring_rank, reading)
    if ring.new_event is not None:
        failures += [
            f"{mode}: an overhead of {value:.2%} is not below {MAX_OVERHEAD:.0%}"
            for mode, value in overhead.items()
            if not value < MAX_OVERHEAD
        ]
    return {
        "step_seconds": {mode: statistics.median(step[mode] for step in steps) for mode in MODES},
        "overhead": overhead,
        "rounds": steps,
        "readings": [[reading._asdict() for reading in of_ranks] for of_ranks in readings],
        "failures": [failure for of_process in ring.gathered(failures) for failure in of_process],
    }


def _measure_rounds(ring: RecordedRing, rounds: int) -> list[dict[str, float]]:
    """Return the seconds of a step by mode, for each round after those for warming up."""
    modes = list(MODES)
    steps = []
    for number in range(_WARM_UP_ROUNDS + rounds):
        first = number % len(modes)
        steps.append({mode: ring.step(mode) for mode in modes[first:] + modes[:first]})
    return steps[_WARM_UP_ROUNDS:]


def _problems(ring: RecordedRing, ring_rank: int, reading: Reading) -> list[str]:
    """Return how a reading contradicts the stopwatch."""
    hops = reading.compute + reading.wait
    compared = f"rank {ring_rank}: hops add up to {hops:.6f} s of {reading.ring:.6f} s"
    if reading.missed:
        return [f"rank {ring_rank}: {reading.missed} rows did not fit into the log"]
    # An event's time is exact to half a microsecond.
    rounding = MAX_ROUNDING_PER_PASS * 2 * ring.layers
    if hops > reading.ring + rounding:
        return [f"{compared}: more than the passes take"]
    may_miss = MAX_MISSING * reading.ring + MAX_MISSING_PER_PASS * 2 * ring.layers
    if ring.new_event is not None and reading.ring - hops > may_miss:
        return [f"{compared}: more than {may_miss:.6f} s are missing"]
    return []


# ---- report ----


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
