"""Evaluate over a ring whether a trained model uses its context.

    python tools/evaluate.py positions --load runs/mine --lengths 1024 4096 16384
    deepspeed --num_gpus 4 tools/evaluate.py positions --load runs/mine --documents joined separated
    deepspeed --num_gpus 4 tools/evaluate.py needles --load runs/mine --lengths 4096 16384 65536

Each part prints a table and writes its results as JSON and as a picture.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro
from tqdm import tqdm

from megatron_ring.config import InferenceConfig, NeedlesConfig, PositionsConfig
from megatron_ring.errors import reporting_errors
from megatron_ring.inference.loading import Loaded, OpenedModel, open_model
from megatron_ring.inference.needles import NeedlesPlan, accuracy_table, evaluate_needles
from megatron_ring.inference.positions import EvaluationPlan, evaluate, table
from megatron_ring.inference.results import ResultFiles
from megatron_ring.monitoring.outputs import tolerate_console_errors
from megatron_ring.parallel.consensus import Consensus, abort_collectively, run_checked
from megatron_ring.parallel.entry_point import arguments_of_user, read_files_as_utf8, report_once
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.rendezvous import TIMEOUT, join_processes, leave_processes
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
        """Check everything that needs no weights; raises the user's errors."""
        return EvaluationPlan.of(self.positions, opened)

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
        """Check everything that needs no weights; raises the user's errors."""
        return NeedlesPlan.of(self.needles, opened)

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
"""The parts, by their names on the command line."""


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
    """Join the processes, evaluate and leave."""
    join_processes(environment, device_type(), TIMEOUT)
    with abort_collectively():
        evaluate_command(command, environment)
    leave_processes()


def evaluate_command(command: Command, environment: Environment) -> None:
    """Open the model, check the options, load the weights, and evaluate. Collective; blocks."""
    consensus = Consensus.build()
    opened = open_model(command.inference, environment.world_size, consensus)
    plan = run_checked(consensus, lambda: command.plan(opened))
    consensus.run_on_rank_zero(command.files.check)
    command.run(plan, opened.load(environment, consensus))


if __name__ == "__main__":
    tolerate_console_errors()
    with reporting_errors():
        environment = Environment.read()
    with report_once(environment):
        read_files_as_utf8()
        main(parse(arguments_of_user(), environment.global_rank == 0), environment)
