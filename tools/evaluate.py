"""Evaluates a trained model over a ring of ranks.

    python tools/evaluate.py positions --load runs/mine --lengths 1024 4096 16384
    deepspeed --num_gpus 4 tools/evaluate.py positions --load runs/mine --documents joined separated
    deepspeed --num_gpus 4 tools/evaluate.py needles --load runs/mine --lengths 4096 16384 65536

Each part prints a table and writes its results as JSON and as a picture.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import megatron_ring.parallel.interrupt_hook  # noqa: F401 (before slow imports)

# isort: split

import tyro
from tqdm import tqdm

from megatron_ring.config import InferenceConfig, NeedlesConfig, PositionsConfig
from megatron_ring.errors import ConfigError, reporting_errors
from megatron_ring.inference.console import opening_lines
from megatron_ring.inference.loading import Loaded, OpenedModel, open_model
from megatron_ring.inference.memory import RankMemory, available_bytes
from megatron_ring.inference.needles import NeedlesPlan, accuracy_table, evaluate_needles
from megatron_ring.inference.positions import EvaluationPlan, evaluate, table
from megatron_ring.inference.results import ResultFiles
from megatron_ring.inference.scoring import check_memory, scoring_memory
from megatron_ring.monitoring.outputs import tolerate_console_errors
from megatron_ring.parallel.consensus import Consensus, abort_collectively, run_checked
from megatron_ring.parallel.entry_point import (
    arguments_of_user,
    read_files_as_utf8,
    report_ended_ranks,
    report_once,
)
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.rendezvous import TIMEOUT, join_processes, leave_processes
from megatron_ring.plan.memory_report import human
from megatron_ring.settings.precision import device_type


@dataclass(frozen=True)
class Positions:
    """Loss and bits per byte by position, at several lengths, of joined or separated documents."""

    inference: InferenceConfig = field(default_factory=InferenceConfig)
    positions: PositionsConfig = field(default_factory=PositionsConfig)

    @property
    def files(self) -> ResultFiles:
        """The files that rank 0 writes."""
        return ResultFiles(Path(self.positions.output), "positions")

    def plan(self, opened: OpenedModel) -> EvaluationPlan:
        """Check everything that needs no weights; raise the user's errors."""
        refuse_chunks(self.inference, "positions")
        return EvaluationPlan.of(self.positions, opened)

    def memory(self, plan: EvaluationPlan, opened: OpenedModel) -> RankMemory:
        """Return the memory of a rank for the longest sample."""
        return scoring_memory(opened, max(plan.lengths))

    def run(self, plan: EvaluationPlan, loaded: Loaded) -> None:
        """Evaluate, and on rank 0 print and write the results. Collective; blocks."""
        is_rank_zero = loaded.consensus.rank == 0
        with tqdm(unit=" samples", disable=not is_rank_zero, file=sys.stderr) as progress:
            curves = evaluate(plan, loaded, progress.update)

        def write() -> None:
            from megatron_ring.inference.position_plot import draw_positions

            for curve in curves:
                print(table(curve), end="\n\n")
            results = {
                **describe(loaded),
                "part": self.positions.part,
                "curves": [asdict(curve) for curve in curves],
            }
            self.files.write(results, lambda picture: draw_positions(curves, picture))
            print(f"wrote {self.files.output} and {self.files.picture}")

        loaded.consensus.run_on_rank_zero(write)


@dataclass(frozen=True)
class Needles:
    """Retrieval of needles from a haystack over context length and depth, as in RULER."""

    inference: InferenceConfig = field(default_factory=InferenceConfig)
    needles: NeedlesConfig = field(default_factory=NeedlesConfig)

    @property
    def files(self) -> ResultFiles:
        """The files that rank 0 writes."""
        return ResultFiles(Path(self.needles.output), "needles")

    def plan(self, opened: OpenedModel) -> NeedlesPlan:
        """Check everything that needs no weights; raise the user's errors."""
        refuse_chunks(self.inference, "needles")
        return NeedlesPlan.of(self.needles, opened)

    def memory(self, plan: NeedlesPlan, opened: OpenedModel) -> RankMemory:
        """Return the memory of a rank for the prompts that are computed together."""
        return scoring_memory(
            opened, min(opened.seq_length, self.needles.samples * max(plan.lengths))
        )

    def run(self, plan: NeedlesPlan, loaded: Loaded) -> None:
        """Evaluate, and on rank 0 print and write the results. Collective; blocks."""
        total = len(list(plan.cells()))
        disable = loaded.consensus.rank != 0
        with tqdm(total=total, unit=" cells", disable=disable, file=sys.stderr) as progress:
            cells = evaluate_needles(plan, loaded, progress.update)

        def write() -> None:
            from megatron_ring.inference.needle_plot import draw_heatmap

            for task in self.needles.tasks:
                print(accuracy_table(cells, task), end="\n\n")
            options = asdict(self.needles)
            shown = ("needles", "wording", "haystack", "seed")
            results = {
                **describe(loaded),
                **{name: options[name] for name in shown},
                "cells": [asdict(cell) | {"accuracy": cell.accuracy} for cell in cells],
            }
            self.files.write(results, lambda picture: draw_heatmap(cells, picture))
            print(f"wrote {self.files.output} and {self.files.picture}")

        loaded.consensus.run_on_rank_zero(write)


Command = Positions | Needles

COMMANDS = {"positions": Positions, "needles": Needles}
"""The parts, by their names on the command line.

Each has ``inference``, ``files``, ``plan``, ``memory`` and ``run``.
"""


def refuse_chunks(inference: InferenceConfig, part: str) -> None:
    """Raise ConfigError for an option that no part of this program uses."""
    if inference.prefill_chunk_size:
        raise ConfigError(
            f"prefill_chunk_size {inference.prefill_chunk_size} has no effect on {part}, which "
            "computes each sample at once. Leave --prefill-chunk-size out; more ranks need less "
            "memory each."
        )


def describe(loaded: Loaded) -> dict[str, object]:
    """Return which model the results are of, and how it ran."""
    return {
        "model": str(loaded.source),
        "ring_size": loaded.grid.ring,
        "tensor_model_parallel_size": loaded.grid.tensor,
        "context_parallel": loaded.layout_name,
        "attention_kernel": loaded.kernel,
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }


def parse(arguments: list[str], is_rank_zero: bool = True) -> Command:
    """Parse the command line; a bad flag ends the program with exit code 2."""
    commands = tyro.extras.subcommand_type_from_defaults(
        {name: kind() for name, kind in COMMANDS.items()},
        {name: kind.__doc__ for name, kind in COMMANDS.items()},
    )
    flags = tyro.conf.configure(tyro.conf.OmitArgPrefixes)(commands)
    return tyro.cli(flags, args=arguments, description=__doc__, console_outputs=is_rank_zero)


def main(command: Command, environment: Environment) -> None:
    """Print the plan of a dry run, or join the processes, evaluate and leave."""
    if command.inference.dry_run:
        world_size = command.inference.world_size or environment.world_size
        opened = open_model(command.inference, world_size)
        plan = command.plan(opened)
        if environment.global_rank == 0:
            command.files.check()
            available = available_bytes(opened.settings.device, world_size)
            print(
                *opening_lines(opened),
                *memory_lines(command.memory(plan, opened), available),
                sep="\n",
            )
        return
    join_processes(environment, device_type(), TIMEOUT)
    with abort_collectively():
        evaluate_command(command, environment)
    leave_processes()


def evaluate_command(command: Command, environment: Environment) -> None:
    """Open the model, check options and memory, load the weights, and evaluate.

    Collective over all processes, which have joined; blocks.
    """
    consensus = Consensus.build()
    opened = open_model(command.inference, environment.world_size, consensus)
    plan = run_checked(consensus, lambda: command.plan(opened))
    consensus.run_on_rank_zero(command.files.check)
    needed = command.memory(plan, opened)
    available = available_bytes(opened.settings.device, environment.local_size)
    if environment.global_rank == 0:
        lines = [*opening_lines(opened), *memory_lines(needed, available)]
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    run_checked(consensus, lambda: check_memory(needed, available, "--lengths to shorter ones"))
    command.run(plan, opened.load(environment, consensus))


def memory_lines(needed: RankMemory, available: int | None) -> list[str]:
    """Describe the memory of a rank."""
    free = "unknown" if available is None else human(available)
    parts = ", ".join(f"{name} {human(value)}" for name, value in asdict(needed).items() if value)
    return [f"memory           per rank: {human(needed.total)} of {free} free: {parts}"]


if __name__ == "__main__":
    tolerate_console_errors()
    with reporting_errors():
        environment = Environment.read()
    with report_once(environment), report_ended_ranks(environment):
        read_files_as_utf8()
        main(parse(arguments_of_user(), environment.global_rank == 0), environment)
