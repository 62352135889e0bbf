"""Measure the peak memory of a training step at growing lengths, and the longest sequence that a budget allows.

    python -m benchmarks.measure_memory --seq-lengths 2048 4096 8192
    python -m benchmarks.measure_memory --nproc 1 2 4 --budget-mib 48 --step 32 --plot docs/memory.svg
    python -m benchmarks.measure_memory --nproc 4 --config configs/llama-1b-128k.yaml --seq-lengths 65536

The real model, ring and engine take steps on random tokens, all ranks in one ring unless the config says otherwise. Of
each length the first step, of a few tokens, makes the optimizer's state, and the last is measured. Reported is the
largest rank's peak, beside what plan/memory.py says:

live bytes   tensors alive at a time: on a CPU by the profiler's record of the allocator, on CUDA by the allocator
resident     on a CPU, what the process's high-water mark (VmHWM) rose above where it was before the model was built;
             besides tensors that is what libraries load and set aside at their first use, some 150 MB

Each of --seq-lengths has processes of its own. With --budget-mib the longest sequence whose live bytes fit is sought
for each number of ranks: from where the plan has it by doubling strides, then by halving the interval. Live bytes do
not depend on how fast the machine is, nor on who else works on it.
"""

import gc
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common import MIB, write_json
from megatron_ring.config import (
    Config,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
    load_yaml,
)
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.invariant import BLOCKS
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.loader import Batch
from megatron_ring.errors import ConfigError, reporting_errors
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.environment import Environment, free_port
from megatron_ring.plan.memory_report import memory_of_stages
from megatron_ring.settings.setup import Setup

# Names of events: the profiler's own for what the allocator gives and takes, and ours.
_MEMORY, _FORGET = "[memory]", "forget the peak"

SMALL = Config(
    model=ModelConfig(num_layers=2, hidden_size=128, num_attention_heads=2),
    parallel=ParallelConfig(context_parallel="striped"),
    training=TrainingConfig(
        train_iters=1,
        lr_warmup_iters=0,
        dtype="fp32",
        # DeepSpeed's bucket is 2 GB however small the model is, which would hide all else.
        deepspeed={"zero_optimization": {"reduce_bucket_size": 500_000}},
    ),
    memory=MemoryConfig(recompute="full"),
)
"""A model so small that its activations are most of it, for lack of --config."""


@dataclass(frozen=True)
class Options:
    nproc: tuple[int, ...] = (1, 2, 4)
    """Ranks, each a process; one number after the other."""
    seq_lengths: tuple[int, ...] = ()
    """Tokens of the whole sequence to measure a step at."""
    budget_mib: float = 0.0
    """Live MiB that a rank may use: the longest sequence that fits is sought. 0: only --seq-lengths are measured."""
    step: int = 64
    """The longest sequence is found to within this many tokens a rank."""
    config: str = ""
    """YAML file of the model and how it is trained. Empty: two layers of width 128, --recompute full."""
    vocab_size: int = 512
    """Token ids of the model."""
    json: str = ""
    """Write the results to this file too."""
    plot: str = ""
    """Draw live bytes by length to this file; its ending says which kind."""


@dataclass(frozen=True)
class Measured:
    """Bytes of the rank that had most. resident is None on CUDA, and where the processes had measured before."""

    nproc: int
    seq_length: int
    live: int
    resident: int | None
    planned: int


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    _check(options)
    measured = {nproc: _measure_all(nproc, options) for nproc in options.nproc}
    longest = (
        {nproc: _longest_of(rows, options) for nproc, rows in measured.items()}
        if options.budget_mib
        else {}
    )
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
    if options.budget_mib < 0 or options.step < 1 or min(options.nproc) < 1:
        problems.append(
            "Budgets must not be below 0, steps and ranks at least 1. Set --budget-mib, --step, --nproc."
        )
    if problems:
        raise ConfigError(problems)
    for nproc in options.nproc:
        for length in options.seq_lengths or (options.step * nproc,):
            Setup.of(
                _config(options, length), nproc
            )  # says what cannot be run before anything is started


def _config(options: Options, seq_length: int) -> Config:
    config = load_yaml(options.config) if options.config else SMALL
    return replace(config, data=replace(config.data, seq_length=seq_length))


def longest_that(fits: Callable[[int], bool], unit: int, guess: int = 0) -> int:
    """The largest multiple of ``unit`` that fits, 0 if none does; whatever fits, so does what is shorter.

    It is soon found where ``guess`` is near.
    """
    low, high = _around(lambda number: fits(number * unit), guess // unit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    return low * unit


def _around(fits: Callable[[int], bool], guess: int) -> tuple[int, int]:
    """A number that fits, or 0, and a larger one that does not, by strides from ``guess`` that double."""
    low, high, stride = guess, guess + 1, 1
    while low > 0 and not fits(low):
        low, high, stride = max(low - stride, 0), low, 2 * stride
    while high > guess and fits(high):
        low, high, stride = high, high + 2 * stride, 2 * stride
    return low, high


# ---- what is told ----


def _longest_of(rows: list[Measured], options: Options) -> int:
    return max((row.seq_length for row in rows if row.live <= options.budget_mib * MIB), default=0)


def _report(options: Options, measured: dict[int, list[Measured]], longest: dict[int, int]) -> None:
    print(f"{'ranks':>5}{'tokens':>10}{'live MiB':>12}{'planned':>12}{'resident':>12}")
    for row in (row for rows in measured.values() for row in rows):
        resident = f"{row.resident / MIB:12.1f}" if row.resident is not None else ""
        print(
            f"{row.nproc:>5}{row.seq_length:>10,}{row.live / MIB:12.1f}{row.planned / MIB:12.1f}{resident}"
        )
    for nproc, rows in measured.items():
        if len(rows) > 1:
            print(
                f"{nproc} ranks: {bytes_a_token(rows):,.0f} bytes for each further token of a rank"
            )
    first = next(iter(longest.values()), 0)
    for nproc, length in longest.items():
        ratio = f", {length / first:.2f} x as on {options.nproc[0]}" if first else ""
        print(f"{options.budget_mib:g} MiB a rank: {length:,} tokens at most on {nproc}{ratio}")


def bytes_a_token(rows: list[Measured]) -> float:
    """What a rank's further token costs, by the shortest and the longest of ``rows``, sorted by length."""
    first, last = rows[0], rows[-1]
    return (last.live - first.live) / (last.seq_length - first.seq_length) * first.nproc


def _draw(options: Options, measured: dict[int, list[Measured]], longest: dict[int, int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "memory"  # the same figures give the same file
    figure, axes = plt.subplots(figsize=(7, 4), layout="tight")
    for nproc, rows in measured.items():
        lengths = [row.seq_length for row in rows]
        (line,) = axes.plot(
            lengths,
            [row.live / MIB for row in rows],
            "o",
            markersize=4,
            label=f"{nproc} rank{'s' * (nproc > 1)}",
        )
        axes.plot(
            lengths, [row.planned / MIB for row in rows], "--", linewidth=1, color=line.get_color()
        )
        if nproc in longest:
            axes.vlines(
                longest[nproc],
                0,
                options.budget_mib,
                color=line.get_color(),
                linestyles=":",
                linewidth=1,
            )
            axes.annotate(f"{longest[nproc]:,}", (longest[nproc], 0), (-4, 4), color=line.get_color(), ha="right",
                          textcoords="offset points", fontsize=9)  # fmt: skip
    if longest:
        axes.axhline(options.budget_mib, color="#222222", linewidth=1, label="budget a rank")
    axes.set(
        xlabel="tokens of the whole sequence",
        ylabel="peak live MiB a rank; dashed: planned",
        xlim=0,
        ylim=0,
    )
    axes.legend(frameon=False)
    figure.savefig(options.plot, metadata={"Date": None} if options.plot.endswith(".svg") else None)
    print(f"drew {options.plot}")


# ---- real ranks ----


def _measure_all(nproc: int, options: Options) -> list[Measured]:
    """--seq-lengths, and those that were tried for --budget-mib, sorted."""
    rows = [_spawn(nproc, options, length)[0] for length in options.seq_lengths]
    if options.budget_mib:
        asked = {row.seq_length for row in rows}
        rows += [row for row in _spawn(nproc, options, None) if row.seq_length not in asked]
    return sorted(rows, key=lambda row: row.seq_length)


def _spawn(nproc: int, options: Options, seq_length: int | None) -> list[Measured]:
    """Of one length, or of those that the search for the longest tries, in processes that are new."""
    port = free_port()
    # Freed tensors go back to the system at once, or the next one's would not count as resident.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's start and end are no news
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(
        _rank, args=(nproc, options, seq_length, port, results), nprocs=nproc
    )
    return results.get()


def _rank(
    rank: int, nproc: int, options: Options, seq_length: int | None, port: int, results
) -> None:
    # Not at the top: the process that starts the ranks needs no DeepSpeed, and theirs is loaded before they measure.
    import megatron_ring.training.assembly  # noqa: F401
    from megatron_ring.engine.engine import leave_processes, start_processes

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = "cuda" if torch.cuda.device_count() >= nproc else "cpu"
    start_processes(Environment(rank, rank, nproc, nproc, threads=1), device)
    rows = (
        _search(rank, nproc, options)
        if seq_length is None
        else [_measure(rank, nproc, seq_length, options)]
    )
    if rank == 0:
        results.put(rows)
    leave_processes()


def _search(rank: int, nproc: int, options: Options) -> list[Measured]:
    rows, budget = [], options.budget_mib * MIB

    def fits(seq_length: int) -> bool:
        # What lengths before it left behind would be resident too.
        rows.append(_measure(rank, nproc, seq_length, options, resident=False))
        return rows[-1].live <= budget

    unit = options.step * nproc
    longest_that(
        fits,
        unit,
        guess=longest_that(lambda length: _planned(length, nproc, options) <= budget, unit),
    )
    return rows


def _planned(seq_length: int, nproc: int, options: Options) -> int:
    setup = Setup.of(_config(options, seq_length), nproc)
    return max(stage.peak for stage in memory_of_stages(setup, options.vocab_size))


def _measure(
    rank: int, nproc: int, seq_length: int, options: Options, resident: bool = True
) -> Measured:
    """Steps of ``seq_length`` tokens; all ranks must. ``resident``: whether that is wanted, and a process new."""
    setup = Setup.of(_config(options, seq_length), nproc)
    resident = resident and setup.device == "cpu"
    own_resident = _resident_peak(setup, rank, options) if resident else 0
    most = torch.tensor([own_resident, _live_peak(setup, rank, options)], device=setup.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    most_resident, most_live = most.tolist()
    planned = _planned(seq_length, nproc, options)
    return Measured(nproc, seq_length, most_live, most_resident if resident else None, planned)


def _resident_peak(setup: Setup, rank: int, options: Options) -> int:
    before = _resident("VmRSS")
    trainer = _Trainer(setup, rank, options.vocab_size)
    trainer.step(trainer.shortest)
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # sets the high-water mark to what is resident now
    trainer.step(setup.layout)
    return _resident("VmHWM") - before


def _live_peak(setup: Setup, rank: int, options: Options) -> int:
    with LiveBytes() as live:
        trainer = _Trainer(setup, rank, options.vocab_size)
        trainer.step(trainer.shortest)
        gc.collect()
        live.forget_peak()
        trainer.step(setup.layout)
    del trainer
    gc.collect()
    return live.peak


class _Trainer:
    """A run on this rank, whose steps may be of any length."""

    def __init__(self, setup: Setup, rank: int, vocab_size: int):
        from megatron_ring.training.assembly import build_model, start_engine

        groups = ProcessGroups.build(setup.grid, rank)
        self.setup, self.vocab_size = setup, vocab_size
        self.at = setup.grid.coordinates(rank)
        reduction = setup.config.parallel.context_parallel_reduction
        self.attention = ContextParallelAttention(
            setup.layout, setup.kernel.name, groups, reduction=reduction
        )
        self.engine = start_engine(
            build_model(setup, groups, self.attention, vocab_size), setup, groups
        )
        self.shortest = _shortest(setup)

    def step(self, layout: Layout) -> None:
        """One optimizer step on random tokens, laid out by ``layout``."""
        self.attention.layout = layout
        positions = layout.positions(self.at.ring, self.at.ulysses, self.setup.grid.ulysses)
        shape = self.setup.config.training.micro_batch_size, len(positions) + 1
        numbers = [torch.randint(self.vocab_size, shape) for _ in range(self.setup.micro_batches)]
        batches = [Batch(x[:, :-1].clone(), x[:, 1:].clone(), positions, None) for x in numbers]
        self.engine.train_step(batches, 1e-4)


def _shortest(setup: Setup) -> Layout:
    """Two stripes, or chunks of two tokens, for every rank, and for every block of one that an invariant ring has.

    Whole for a pipeline, whose stages settle sizes once.
    """
    whole = setup.layout
    blocks = BLOCKS if setup.config.parallel.context_parallel_reduction == "invariant" else 1
    few = 2 * blocks * whole.ring_size * whole.stripe_size * setup.grid.ulysses * setup.grid.tensor
    if setup.grid.pipe > 1 or few > whole.seq_length:
        return whole
    return Layout(whole.name, few, whole.ring_size, whole.stripe_size)


def _resident(mark: str) -> int:
    """VmRSS, the bytes resident now, or VmHWM, their high-water mark; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{mark}:")), 0)


class LiveBytes:
    """Tensor bytes that came to live while this was open: ``after`` it, and ``peak`` while it was.

    On a CPU from the profiler's record of the allocator, which is of this thread alone; backward runs in it too. What
    another thread frees, gloo's for example, stays counted: between ranks a peak may be some MiB too high, seldom twice
    the same. Not counted is what lived before.
    """

    def __enter__(self) -> "LiveBytes":
        if torch.cuda.is_available():
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    def forget_peak(self) -> None:
        """Count the peak from here on, of all that came to live since the beginning."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            with record_function(_FORGET):
                pass

    def __exit__(self, *error: object) -> None:
        if torch.cuda.is_available():
            self.after = torch.cuda.memory_allocated() - self._before
            self.peak = torch.cuda.max_memory_allocated() - self._before
        else:
            self._profile.__exit__(*error)
            self._replay(self._profile.profiler.kineto_results.events())

    def _replay(self, events: list) -> None:
        self.after = self.peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == _MEMORY:
                self.after += event.nbytes()
                self.peak = max(self.peak, self.after)
            elif event.name() == _FORGET:
                self.peak = self.after


if __name__ == "__main__":
    with reporting_errors():
        main()
