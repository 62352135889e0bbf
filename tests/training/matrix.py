"""Train the rows of a covering set on several ranks and compare each with one process.

Shared by the parity matrix on CPUs (test_matrix.py) and by the GPU tests (tests/gpu). Rows with the
same number of processes share the processes: a start takes far longer than a row. A row that fails
ends its processes; the rows after it continue in new ones.
"""

import functools
import math
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ring.config import Config
from megatron_ring.errors import ConfigError, KernelUnavailable
from megatron_ring.settings.precision import device_type
from megatron_ring.settings.run_settings import RunSettings
from tests.distributed import RankFailed, run_ranks
from tests.training import tiny
from tests.training.covering import Assignment, Factors
from tests.training.trained import Tolerance, Trained, differences

AXES = ("pipe", "data", "ring", "ulysses", "tensor")
"""The factors whose product is the number of processes."""

COUNTERPARTS = 0
"""In a list of numbers of processes: the one process with which rows are compared."""

Row = tuple
"""The values of an assignment, hashable."""


def key(row: Assignment) -> Row:
    return tuple(row.values())


@dataclass(frozen=True, eq=False)
class Matrix:
    """The factors of a parity matrix and the config of each assignment.

    The first value of each factor is its default; together the defaults are one process without
    sharding, recompute or chunks. ``RunSettings.resolve`` decides whether an assignment is legal.

    Attributes:
        mathematics: The factors that define what is computed. All others define how, which must
            make no difference.
        config: The config of an assignment, a function of a module.
    """

    factors: Factors
    mathematics: Collection[str]
    config: Callable[[Assignment], Config]

    def defaults_with(self, **changes) -> Assignment:
        """Return the default of every factor that is not among ``changes``."""
        return {name: values[0] for name, values in self.factors.items()} | changes

    def one_process(self, row: Assignment) -> Assignment:
        """Return the assignment of one process that computes the same as ``row``."""
        return {
            name: row[name] if name in self.mathematics else values[0]
            for name, values in self.factors.items()
        }

    def world_size(self, row: Assignment) -> int:
        return prod(row[axis] for axis in AXES)

    def refusals(self, row: Assignment) -> list[str]:
        """Return why ``row`` cannot run on this machine, by ``RunSettings.resolve``."""
        try:
            RunSettings.resolve(self.config(row), self.world_size(row))
        except (ConfigError, KernelUnavailable) as error:
            return error.problems
        return []

    def is_legal(self, row: Assignment, processes: int) -> bool:
        """Whether ``row`` can run on up to so many processes."""
        return self.world_size(row) <= processes and self._is_accepted(key(row))

    def describe(self, row: Assignment) -> str:
        """Return the values of ``row`` that are not defaults."""
        defaults = self.defaults_with()
        changed = [f"{name} {value}" for name, value in row.items() if value != defaults[name]]
        return ", ".join(changed) or "defaults"

    @functools.cached_property
    def _is_accepted(self) -> Callable[[Row], bool]:
        @functools.cache
        def is_accepted(values: Row) -> bool:
            return not self.refusals(dict(zip(self.factors, values, strict=True)))

        return is_accepted


class TrainedRows(NamedTuple):
    """What rows gave on so many ranks: the results of every rank, or why there are none.

    Rows that there was no time for are in neither.
    """

    results: dict[Row, list[Trained]]
    failures: dict[Row, str]


def train_on_ranks(
    matrix: Matrix,
    world_size: int,
    rows: Sequence[Assignment],
    corpora: Mapping[str, Path],
    steps: int,
    device: str = "cpu",
    seconds: float = math.inf,
) -> TrainedRows:
    """Train every row, one after another, in the same ``world_size`` processes.

    No row begins later than ``seconds`` after this call.
    """
    deadline = time.time() + seconds
    trained = TrainedRows({}, {})
    remaining = list(rows)
    while remaining:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (matrix.config, remaining, corpora, steps, Path(folder), deadline)
            try:
                run_ranks(world_size, _train_each, *arguments, device=device)
                failure = None
            except RankFailed as error:
                failure = str(error)
            of_rows = [_load(Path(folder), index, world_size) for index in range(len(remaining))]
        count = len(of_rows)
        if failure:
            # If all rows have results, the ranks failed as they left.
            count = of_rows.index(None) if None in of_rows else count - 1
            trained.failures[key(remaining[count])] = failure
        for row, results in zip(remaining[:count], of_rows):
            if results:
                trained.results[key(row)] = results
        remaining = remaining[count + 1 :]
    return trained


def _train_each(
    rank: int,
    world_size: int,
    config_of: Callable[[Assignment], Config],
    rows: list[Assignment],
    corpora: Mapping[str, Path],
    steps: int,
    folder: Path,
    deadline: float,
) -> None:
    """Train every row with an engine of its own and write the result to ``folder``."""
    for index, row in enumerate(rows):
        is_late = torch.tensor(float(time.time() > deadline), device=device_type())
        dist.all_reduce(is_late)
        if is_late:
            return
        run = tiny.Run(config_of(row), corpora[row["documents"]], rank, world_size)
        torch.save(Trained.after(run, steps), folder / f"{index} of {rank}.pt")


def _load(folder: Path, index: int, world_size: int) -> list[Trained] | None:
    """Return the results of a row by rank, or None if a rank has not written its own."""
    files = [folder / f"{index} of {rank}.pt" for rank in range(world_size)]
    if not all(file.exists() for file in files):
        return None
    try:
        return [torch.load(file, weights_only=False) for file in files]
    except (EOFError, RuntimeError):  # a rank was ended while it wrote
        return None


@dataclass(frozen=True)
class Comparison:
    """The rows of one number of processes, compared with one process.

    rows: those that were compared. left_out: those that there was no time for. differences: by
    description of the row, what differs or why it failed; empty if all is well.
    """

    rows: int
    left_out: int
    differences: dict[str, list[str]]


class OneProcess:
    """The results of one process for what rows compute, each trained once.

    ``seconds``: no row begins later after the start of its number of processes.
    """

    def __init__(
        self,
        matrix: Matrix,
        corpora: Mapping[str, Path],
        steps: int,
        device: str = "cpu",
        seconds: float = math.inf,
    ):
        self.matrix = matrix
        self.corpora = corpora
        self.steps = steps
        self.device = device
        self.seconds = seconds
        self.trained = TrainedRows({}, {})

    def train(self, rows: Sequence[Assignment]) -> None:
        """Train what ``rows`` compute, as far as that has not been done."""
        needed = {key(row): row for row in map(self.matrix.one_process, rows)}
        missing = [row for values, row in needed.items() if not _has(self.trained, values)]
        found = self._train(1, missing)
        self.trained.results.update(found.results)
        self.trained.failures.update(found.failures)

    def compare(
        self,
        rows: Sequence[Assignment],
        world_size: int,
        tolerance: Callable[[Assignment], Tolerance],
    ) -> Comparison:
        """Train those of ``rows`` that are for ``world_size`` processes, and compare them."""
        self.train(rows)
        own = [row for row in rows if self.matrix.world_size(row) == world_size]
        return self.compare_trained(own, self._train(world_size, own), tolerance)

    def compare_concurrently(
        self,
        rows: Sequence[Assignment],
        phases: Sequence[Sequence[int]],
        tolerance: Callable[[Assignment], Tolerance],
    ) -> dict[int, Comparison]:
        """Compare the rows of each number of processes in ``phases``.

        Those of a phase train at the same time. COUNTERPARTS among them is the one process that
        the rows are compared with.
        """
        sizes = sorted({size for phase in phases for size in phase} - {COUNTERPARTS})
        own = {size: [r for r in rows if self.matrix.world_size(r) == size] for size in sizes}
        compared = [row for size in sizes for row in own[size]]
        found: dict[int, TrainedRows] = {}
        for phase in phases:
            with ThreadPoolExecutor(len(phase)) as threads:
                futures = {
                    size: threads.submit(self._train, size, own[size])
                    for size in phase
                    if size != COUNTERPARTS
                }
                if COUNTERPARTS in phase:
                    self.train(compared)
            found |= {size: future.result() for size, future in futures.items()}
        return {
            size: self.compare_trained(own[size], trained, tolerance)
            for size, trained in found.items()
        }

    def compare_trained(
        self,
        rows: Sequence[Assignment],
        trained: TrainedRows,
        tolerance: Callable[[Assignment], Tolerance],
    ) -> Comparison:
        """Compare results of ``rows`` with those of one process."""
        found = {}
        left_out = 0
        for row in rows:
            alone = key(self.matrix.one_process(row))
            if not (_has(trained, key(row)) and _has(self.trained, alone)):
                left_out += 1
                continue
            failures = trained.failures.get(key(row)), self.trained.failures.get(alone)
            differing = [failure for failure in failures if failure]
            if not differing:
                (expected,) = self.trained.results[alone]
                differing = differences(trained.results[key(row)], expected, tolerance(row))
            if differing:
                found[self.matrix.describe(row)] = differing
        return Comparison(len(rows) - left_out, left_out, found)

    def _train(self, world_size: int, rows: Sequence[Assignment]) -> TrainedRows:
        return train_on_ranks(
            self.matrix,
            world_size,
            rows,
            self.corpora,
            self.steps,
            self.device,
            self.seconds,
        )


def _has(trained: TrainedRows, values: Row) -> bool:
    return values in trained.results or values in trained.failures
