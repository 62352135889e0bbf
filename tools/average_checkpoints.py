"""The mean of several checkpoints of one model: a command line over checkpoint/average.py."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_ring.checkpoint import names
from megatron_ring.checkpoint.average import average
from megatron_ring.checkpoint.locate import locate, verify
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.errors import CheckpointError, ConfigError, reporting_errors


@dataclass(frozen=True)
class Options:
    """Write the mean of the weights of CHECKPOINTS to the folder OUT.

    It is a checkpoint without the optimizer's state, of the step of the newest, in the types of the first.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A folder that holds no checkpoints yet; --load takes it."""
    checkpoints: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT...")
    ]
    """Folders of checkpoints, or ones given as --save, of which the checkpoint that latest names is taken."""
    last: int = 0
    """K: the last K checkpoints of the one folder that is given. 0: those that are given."""
    weights: tuple[float, ...] = ()
    """What each counts, in the order given, with --last from the oldest to the newest. Empty: all the same."""

    def problems(self) -> list[str]:
        """What cannot be met, each with its remedy."""
        given, count = len(self.checkpoints), self.last or len(self.checkpoints)
        found = []
        if count < 2:
            found.append(
                f"{count} checkpoints have no mean: 2 or more are needed. Give more, or set --last."
            )
        if self.last and given != 1:
            found.append(
                f"last {self.last} is of one folder, and {given} are given. Drop --last, or give one."
            )
        if self.weights and len(self.weights) != count:
            found.append(
                f"{len(self.weights)} weights are given for {count} checkpoints. Set --weights."
            )
        bad = [weight for weight in self.weights if not 0 < weight < math.inf]
        return found + [
            f"weight {weight:g} must be above 0, and finite. Set --weights." for weight in bad
        ]


def run(options: Options) -> str:
    """Check every byte of the checkpoints and write their mean; what was done. Raises ConfigError, CheckpointError."""
    if problems := options.problems():
        raise ConfigError(problems)
    paths = _last(options) if options.last else [locate(path).path for path in options.checkpoints]
    for path in paths:
        verify(path)
    weights = list(options.weights) or [1.0] * len(paths)
    written = average(options.out, [Summary.of(path) for path in paths], weights)
    shares = ", ".join(f"{weight:g} x {path}" for weight, path in zip(weights, paths, strict=True))
    return f"{written}: the mean of {shares}."


def _last(options: Options) -> list[Path]:
    """From the oldest to the newest."""
    found, _ = names.candidates(options.checkpoints[0])
    if len(found) < options.last:
        raise CheckpointError(
            f"{options.checkpoints[0]} has {len(found)} checkpoints up to its latest, not {options.last}. Set --last."
        )
    return found[: options.last][::-1]


def main(arguments: list[str] | None = None) -> None:
    """Leaves with the exit code of the error whose message was printed."""
    with reporting_errors():
        options = tyro.cli(Options, args=arguments, description=Options.__doc__)
        print(run(options))


if __name__ == "__main__":
    main()
