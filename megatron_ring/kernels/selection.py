"""Select one of several implementations: the first candidate that supports what a run requires.

Attention kernels (attention/choice.py, ``--attention-kernel``) and fused operations
(fused/choose_libraries.py, ``--fused-operations``) share this. Each has a support table with one
cell for every implementation and requirement. The tables are read before a run starts, so no
requirement is ignored silently.
"""

import enum
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Validation(enum.Enum):
    """How a supported cell has been validated; the value is the word used in the documents."""

    TESTED = "tested"
    MEASURED = "measured on H100"
    INTERPRETED = "interpreted"
    STAND_IN = "stand-in"
    UNPROVEN = "unproven"

    @property
    def caveat(self) -> str:
        """The warning for a run that relies on such a cell; empty for TESTED."""
        return _CAVEATS[self]


_CAVEATS = {
    Validation.TESTED: "",
    Validation.MEASURED: "measured on an H100, never run on such a device",
    Validation.INTERPRETED: "tested in Triton's interpreter, never run on such a device",
    Validation.STAND_IN: "tested with a stand-in for the library, never run on such a device",
    Validation.UNPROVEN: "written and never run on such a device",
}


@dataclass(frozen=True)
class Unsupported:
    """A refused cell.

    reason: why it is refused. instead: what to set or install, with the flag. Neither ends with a
    period.
    """

    reason: str
    instead: str = ""


Cell = Validation | Unsupported


class Candidates(NamedTuple):
    """Names of implementations in order of preference, and the reason for this order."""

    names: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Assessment:
    """What one implementation offers a run on this machine.

    cells: its cell of the support table for each requirement of the run.
    unavailable: why it cannot run on this machine at all, None if it can.
    """

    cells: Mapping[enum.Enum, Cell]
    unavailable: Unsupported | None = None

    @property
    def usable(self) -> bool:
        """Whether the implementation is available and supports every requirement."""
        refused = any(isinstance(cell, Unsupported) for cell in self.cells.values())
        return not refused and self.unavailable is None

    def caveats(self) -> Iterator[tuple[Validation, list[str]]]:
        """Yield the requirements that are supported but not tested on such a device."""
        for validation in Validation:
            names = [
                requirement.value for requirement, cell in self.cells.items() if cell is validation
            ]
            if names and validation.caveat:
                yield validation, names


@dataclass
class Refusal:
    """A reason for refusing implementations; without ``requirements`` they cannot run at all."""

    cause: Unsupported
    implementations: list[str] = field(default_factory=list)
    requirements: list[str] = field(default_factory=list)


def first_usable(assessments: Mapping[str, Assessment]) -> str | None:
    """Return the first candidate that is available and supports every requirement, or None."""
    return next((name for name, assessed in assessments.items() if assessed.usable), None)


def refusals(assessments: Mapping[str, Assessment], before: str | None = None) -> list[Refusal]:
    """Collect why the candidates before ``before``, or all, were refused, each reason once."""
    by_cause: dict[Unsupported, Refusal] = {}

    def add(cause: Unsupported, name: str, requirements: Iterable[str]) -> None:
        refusal = by_cause.setdefault(cause, Refusal(cause))
        refusal.implementations += [] if name in refusal.implementations else [name]
        refusal.requirements += [one for one in requirements if one not in refusal.requirements]

    for name, assessed in assessments.items():
        if name == before:
            break
        for requirement, cell in assessed.cells.items():
            if isinstance(cell, Unsupported):
                add(cell, name, [requirement.value])
        if assessed.unavailable:
            add(assessed.unavailable, name, [])
    return list(by_cause.values())


def installed_version(distribution: str) -> str:
    """Return the version of an installed distribution, "" if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
