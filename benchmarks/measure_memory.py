"""Measure the peak memory of training steps by length, and the longest sequence within a budget.

    python -m benchmarks.measure_memory --seq-lengths 2048 4096 8192
    python -m benchmarks.measure_memory --nproc 1 2 4 --budget-mib 48 --step 32 \\
        --plot docs/memory.svg
    python -m benchmarks.measure_memory --nproc 4 --config configs/llama-1b-128k.yaml \\
        --seq-lengths 65536

The real model, ring and engine take steps on random tokens, with all ranks in one ring unless the
config specifies otherwise. For each length a first step on a few tokens creates the optimizer's
state, and a second step on the whole length is measured. The table has the peak memory of the
largest rank and the one that plan/memory.py predicts:

live bytes   tensors alive at once, by the allocator; on a CPU from the profiler's record of it
resident     CPU only: how far the process's high-water mark (VmHWM) rose above the memory that was
             resident before the model was built. Besides tensors this includes what libraries load
             and reserve on first use, some 150 MB

Each of --seq-lengths is measured in new processes. With --budget-mib the longest sequence whose
live bytes fit is searched for each number of ranks: starting from the planned one, by doubling
strides, then by bisection. Live bytes depend neither on the speed of the machine nor on its load.
"""

import gc
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from benchmarks.common import MIB, check_outputs, write_json
from benchmarks.live_memory import LiveBytes
from benchmarks.training_steps import Trainer
from megatron_ring.config import (
    Config,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
    load_yaml,
)
from megatron_ring.context_parallel.invariant import BLOCKS
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.errors import ConfigError, not_positive, reporting_errors
from megatron_ring.parallel.environment import Environment, free_port
from megatron_ring.plan.memory_report import memory_of_stages
from megatron_ring.settings.run_settings import RunSettings

SMALL = Config(
    model=ModelConfig(num_layers=2, hidden_size=128, num_attention_heads=2),
    parallel=ParallelConfig(context_parallel="striped"),
    training=TrainingConfig(
        train_iters=1,
        lr_warmup_iters=0,
        dtype="fp32",
        # A bucket of one size, so that the lengths that fit do not depend on the vocabulary.
        deepspeed={"zero_optimization": {"reduce_bucket_size": 500_000}},
    ),
    memory=MemoryConfig(recompute="full"),
)
"""The model without --config: so small that most of its memory is activations."""


@dataclass(frozen=True)
class Options:
    nproc: tuple[int, ...] = (1, 2, 4)
    """Numbers of ranks to measure, one after another; each rank is a process."""
    seq_lengths: tuple[int, ...] = ()
    """Lengths of the whole sequence to measure, in tokens."""
    budget_mib: float = 0.0
    """Search the longest sequence that needs at most this many live MiB per rank. 0: no search."""
    step: int = 64
    """Resolution of the search, in tokens per rank."""
    config: str = ""
    """YAML file of the model and its training. Empty: two layers of width 128, --recompute full."""
    vocab_size: int = 512
    """Vocabulary size of the model."""
    json: str = ""
    """Also write the results to this file."""
    plot: str = ""
    """Plot live bytes by length to this file; its suffix selects the format."""


@dataclass(frozen=True)
class Measured:
    """Peak bytes of the rank with the most.

    ``resident`` is None on CUDA and in processes that had measured another length before.
    """

    nproc: int
    seq_length: int
    live: int
    resident: int | None
    planned: int


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    check_outputs(json=options.json, plot=options.plot)
    _check(options)
    measured = {nproc: _measure_all(nproc, options) for nproc in options.nproc}
    longest = {}
    if options.budget_mib:
        longest = {nproc: _longest_of(rows, options) for nproc, rows in measured.items()}
    _report(options, measured, longest)
    rows = [asdict(row) for of_nproc in measured.values() for row in of_nproc]
    findings = {"options": asdict(options), "longest": longest, "measured": rows}
    write_json(options.json, findings)
    if options.plot:
        _draw(options, measured, longest)


def _check(options: Options) -> None:
    problems = []
    if not options.seq_lengths and not options.budget_mib:
        problems.append("Nothing to measure. Set --seq-lengths or --budget-mib.")
    if not 0 <= options.budget_mib < math.inf:
        problems.append(
            f"budget_mib {options.budget_mib:g} must be finite and at least 0. Set --budget-mib."
        )
    problems += not_positive(options, "step", "nproc")
    if problems:
        raise ConfigError(problems)
    # Resolving the settings raises ConfigError for an illegal length before any process starts.
    for nproc in options.nproc:
        for length in options.seq_lengths or (options.step * nproc,):
            RunSettings.resolve(_config(options, length), nproc)


def _config(options: Options, seq_length: int) -> Config:
    config = load_yaml(options.config) if options.config else SMALL
    return replace(config, data=replace(config.data, seq_length=seq_length))


# ---- search for the longest sequence ----


def longest_that(fits: Callable[[int], bool], unit: int, guess: int = 0) -> int:
    """Return the largest multiple of ``unit`` that fits, or 0 if none does.

    Whatever is shorter than a length that fits must fit too. Needs few trials if ``guess`` is near
    the result.
    """
    low, high = _bracket(lambda multiple: fits(multiple * unit), guess // unit)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * unit):
            low = middle
        else:
            high = middle
    return low * unit


def _bracket(fits: Callable[[int], bool], guess: int) -> tuple[int, int]:
    """Return a number that fits, or 0, and a larger one that does not fit.

    The strides from ``guess`` double.
    """
    low = guess
    high = guess + 1
    stride = 1
    while low > 0 and not fits(low):
        high = low
        low = max(low - stride, 0)
        stride *= 2
    while high > guess and fits(high):
        low = high
        high += 2 * stride
        stride *= 2
    return low, high


# ---- results ----


def _longest_of(rows: list[Measured], options: Options) -> int:
    budget = options.budget_mib * MIB
    return max((row.seq_length for row in rows if row.live <= budget), default=0)


def _report(options: Options, measured: dict[int, list[Measured]], longest: dict[int, int]) -> None:
    print(f"{'ranks':>5}{'tokens':>10}{'live MiB':>12}{'planned':>12}{'resident':>12}")
    for rows in measured.values():
        for row in rows:
            resident = f"{row.resident / MIB:12.1f}" if row.resident is not None else ""
            live = f"{row.live / MIB:12.1f}{row.planned / MIB:12.1f}"
            print(f"{row.nproc:>5}{row.seq_length:>10,}{live}{resident}")
    for nproc, rows in measured.items():
        if len(rows) > 1:
            print(
                f"{nproc} ranks: {bytes_per_token(rows):,.0f} bytes per additional token of a rank"
            )
    first = next(iter(longest.values()), 0)
    for nproc, length in longest.items():
        ratio = f", {length / first:.2f} times that of {options.nproc[0]}" if first else ""
        print(f"{options.budget_mib:g} MiB per rank: at most {length:,} tokens on {nproc}{ratio}")


def bytes_per_token(rows: list[Measured]) -> float:
    """Return the cost of an additional token of a rank, from the shortest and the longest row.

    ``rows`` are sorted by length.
    """
    first = rows[0]
    last = rows[-1]
    return (last.live - first.live) / (last.seq_length - first.seq_length) * first.nproc


def _draw(options: Options, measured: dict[int, list[Measured]], longest: dict[int, int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "memory"  # the same figures give the same file
    figure, axes = plt.subplots(figsize=(7, 4), layout="tight")
    for nproc, rows in measured.items():
        lengths = [row.seq_length for row in rows]
        live = [row.live / MIB for row in rows]
        planned = [row.planned / MIB for row in rows]
        label = f"{nproc} rank{'s' * (nproc > 1)}"
        (line,) = axes.plot(lengths, live, "o", markersize=4, label=label)
        color = line.get_color()
        axes.plot(lengths, planned, "--", linewidth=1, color=color)
        if nproc in longest:
            end = longest[nproc]
            axes.vlines(end, 0, options.budget_mib, color=color, linestyles=":", linewidth=1)
            axes.annotate(
                f"{end:,}",
                (end, 0),
                (-4, 4),
                color=color,
                ha="right",
                textcoords="offset points",
                fontsize=9,
            )
    if longest:
        axes.axhline(options.budget_mib, color="#222222", linewidth=1, label="budget per rank")
    axes.set(
        xlabel="tokens of the whole sequence",
        ylabel="peak live MiB per rank (dashed: planned)",
        xlim=0,
        ylim=0,
    )
    axes.legend(frameon=False)
    figure.savefig(options.plot, metadata={"Date": None} if options.plot.endswith(".svg") else None)
    print(f"drew {options.plot}")


# ---- real ranks ----


def _measure_all(nproc: int, options: Options) -> list[Measured]:
    """Measure --seq-lengths and the lengths that the search tries; return them sorted."""
    rows = [_spawn(nproc, options, length)[0] for length in options.seq_lengths]
    if options.budget_mib:
        lengths = {row.seq_length for row in rows}
        rows += [row for row in _spawn(nproc, options, None) if row.seq_length not in lengths]
    return sorted(rows, key=lambda row: row.seq_length)


def _spawn(nproc: int, options: Options, seq_length: int | None) -> list[Measured]:
    """Measure one length, or (None) the lengths that the search tries, in new processes."""
    port = free_port()
    # Return freed memory to the system at once; else tensors that reuse it would not be counted.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # no messages about the profiler's start and end
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(
        _run_rank, args=(nproc, options, seq_length, port, results), nprocs=nproc
    )
    return results.get()


def _run_rank(
    rank: int, nproc: int, options: Options, seq_length: int | None, port: int, results
) -> None:
    # Imported here because the parent process does not need DeepSpeed, and the ranks have to load
    # it before they measure.
    import megatron_ring.training.assembly  # noqa: F401
    from megatron_ring.engine.deepspeed_groups import start_processes
    from megatron_ring.parallel.rendezvous import leave_processes

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = "cuda" if torch.cuda.device_count() >= nproc else "cpu"
    start_processes(Environment(rank, rank, nproc, nproc, threads=1), device)
    rows = _measure_lengths(rank, nproc, options, seq_length)
    if rank == 0:
        results.put(rows)
    leave_processes()


def _measure_lengths(
    rank: int, nproc: int, options: Options, seq_length: int | None
) -> list[Measured]:
    if seq_length is not None:
        return [_measure(rank, nproc, seq_length, options)]
    return _search(rank, nproc, options)


def _search(rank: int, nproc: int, options: Options) -> list[Measured]:
    rows = []
    budget = options.budget_mib * MIB
    unit = options.step * nproc

    def is_planned_to_fit(seq_length: int) -> bool:
        return _planned(seq_length, nproc, options) <= budget

    def fits(seq_length: int) -> bool:
        # Resident memory would include what earlier lengths left in this process.
        rows.append(_measure(rank, nproc, seq_length, options, resident=False))
        return rows[-1].live <= budget

    longest_that(fits, unit, guess=longest_that(is_planned_to_fit, unit))
    return rows


def _planned(seq_length: int, nproc: int, options: Options) -> int:
    setup = RunSettings.resolve(_config(options, seq_length), nproc)
    return max(stage.peak for stage in memory_of_stages(setup, options.vocab_size))


def _measure(
    rank: int, nproc: int, seq_length: int, options: Options, resident: bool = True
) -> Measured:
    """Take steps of ``seq_length`` tokens and return the maximum over ranks; collective.

    Args:
        resident: Also measure resident memory; needs a new process.
    """
    setup = RunSettings.resolve(_config(options, seq_length), nproc)
    resident = resident and setup.device == "cpu"
    local_resident = _resident_peak(setup, rank, options) if resident else 0
    local_live = live_peak(setup, rank, options.vocab_size)
    peaks = torch.tensor([local_resident, local_live], device=setup.device)
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    max_resident, max_live = peaks.tolist()
    planned = _planned(seq_length, nproc, options)
    return Measured(nproc, seq_length, max_live, max_resident if resident else None, planned)


def _resident_peak(setup: RunSettings, rank: int, options: Options) -> int:
    before = _resident("VmRSS")
    trainer = Trainer(setup, rank, options.vocab_size)
    trainer.step(_shortest(setup))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    trainer.step()
    return _resident("VmHWM") - before


def live_peak(setup: RunSettings, rank: int, vocab_size: int) -> int:
    """Return the peak of live bytes on this rank in a training step; collective."""
    with LiveBytes() as live:
        trainer = Trainer(setup, rank, vocab_size)
        trainer.step(_shortest(setup))
        gc.collect()
        live.forget_peak()
        trainer.step()
    del trainer
    gc.collect()
    return live.peak


def _shortest(setup: RunSettings) -> Layout:
    """Return a layout with few tokens: two stripes, or chunks of two tokens, per rank.

    An invariant ring has so many per block. A pipeline gets the whole length, because its stages
    fix their message sizes once.
    """
    whole = setup.layout
    blocks = BLOCKS if setup.config.parallel.context_parallel_reduction == "invariant" else 1
    ranks = whole.ring_size * setup.grid.ulysses * setup.grid.tensor
    length = 2 * blocks * whole.stripe_size * ranks
    if setup.grid.pipe > 1 or length > whole.seq_length:
        return whole
    return Layout(whole.name, length, whole.ring_size, whole.stripe_size)


def _resident(field: str) -> int:
    """Return a field of /proc/self/status in bytes, 0 if the system does not have it.

    VmRSS is the memory that is resident now, VmHWM its high-water mark.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    with reporting_errors():
        main()
