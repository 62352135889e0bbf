"""What is known of a step on every rank when it is over, and what rank 0 learns of it and tells."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class StepTime(NamedTuple):
    """began: a moment, time.monotonic_ns(). seconds: from there to its end, data_seconds of them waiting for data.

    is_told: whether the console has a line for this step, as it has once a log interval.
    """

    step: int
    began: int
    seconds: float
    data_seconds: float
    is_told: bool


@dataclass(frozen=True)
class RingReport:
    """figures: for the step's line in the metrics file; lines: for the console. Empty on ranks that tell nothing."""

    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def __add__(self, other: "RingReport") -> "RingReport":
        return RingReport(self.figures | other.figures, self.lines + other.lines)
