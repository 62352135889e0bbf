"""Averages several checkpoints of one model: the command line of checkpoint/average.py."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import megatron_ring.parallel.interrupt_hook  # noqa: F401 (before slow imports)

# isort: split

import tyro

from megatron_ring.checkpoint import names
from megatron_ring.checkpoint.average import average
from megatron_ring.checkpoint.locate import locate, verify
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.errors import CheckpointError, ConfigError, counted, reporting_errors


@dataclass(frozen=True)
class Options:
    """Write the mean of the weights of several checkpoints to the folder OUT.

    The mean is a checkpoint without optimizer state. Its step is that of the newest checkpoint, its
    dtypes are those of the first.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the mean, which must hold no checkpoints yet; use it with --load."""
    checkpoints: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT...")
    ]
    """Folders of checkpoints, or --save folders, of which the latest checkpoint is used."""
    last: int = 0
    """K: average the last K checkpoints of the single given folder. 0: average the given ones."""
    weights: tuple[float, ...] = ()
    """Weights in the order of the checkpoints; with --last, from the oldest. Empty: all equal."""

    def problems(self) -> list[str]:
        """Return every invalid option or combination, each with its remedy."""
        given = len(self.checkpoints)
        count = self.last or given
        problems = []
        if count < 2:
            problems.append(
                f"a mean needs at least 2 checkpoints, not {count}. Give more, or set --last."
            )
        if self.last and given != 1:
            problems.append(
                f"last {self.last} needs one folder, and {given} are given. "
                "Leave out --last, or give one folder."
            )
        if self.weights and len(self.weights) != count:
            problems.append(
                f"{counted(len(self.weights), 'weight')} for "
                f"{counted(count, 'checkpoint')}. Set --weights."
            )
        for weight in self.weights:
            if not 0 < weight < math.inf:
                problems.append(f"weight {weight:g} must be above 0 and finite. Set --weights.")
        return problems


def run(options: Options) -> str:
    """Verify every byte of the checkpoints and write their mean; returns a line for the user.

    Raises ConfigError and CheckpointError.
    """
    if problems := options.problems():
        raise ConfigError(problems)
    paths = _last(options) if options.last else [locate(path).path for path in options.checkpoints]
    for path in paths:
        verify(path)
    weights = list(options.weights) or [1.0] * len(paths)
    written = average(options.out, [Summary.of(path) for path in paths], weights)
    terms = ", ".join(f"{weight:g} x {path}" for weight, path in zip(weights, paths, strict=True))
    return f"{written}: the mean of {terms}."


def _last(options: Options) -> list[Path]:
    """Return the last checkpoints of the folder, from the oldest to the newest."""
    newest_first, _ = names.candidates(options.checkpoints[0])
    if len(newest_first) < options.last:
        raise CheckpointError(
            f"{options.checkpoints[0]} has {counted(len(newest_first), 'checkpoint')} up to its "
            f"latest, not {options.last}. Set --last."
        )
    return newest_first[: options.last][::-1]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with the error's exit code after printing its message."""
    with reporting_errors():
        options = tyro.cli(Options, args=arguments)
        print(run(options))


if __name__ == "__main__":
    main()
