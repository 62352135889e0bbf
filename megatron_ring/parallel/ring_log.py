"""A log of what a process did in its rings: rows of four integers, in order, read once a step.

A row has the time, time.monotonic_ns(), the event, and two integers that depend on the event. On
CUDA the time is that of the device, and until the step has ended there is the number of a mark in
its place (device_clock.py). The rows are in an array of a fixed size, so that appending one neither
allocates nor blocks. Rows that do not fit are counted.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np


class Event(IntEnum):
    """What happened, and what the row's ``a`` and ``b`` hold."""

    ENTERED = 0  # a pass of the ring began. a: layer, b: Direction
    HOP = 1  # a hop began. a: its number from 1, b: number of hops
    SENT = 2  # a send was started. a: bytes, b: the receiver's global rank
    WAITING = 3  # a wait for another process began. a: its global rank
    WAITED = 4  # that wait ended
    RECEIVED = 5  # a message arrived. a: number of its transfer's SENT row, b: sender's global rank
    LEFT = 6  # the pass ended
    OPTIMIZING = 7  # the optimizer's step began
    OPTIMIZED = 8  # the optimizer's step ended
    SOURCE = 9  # after HOP. a: the ring rank whose keys, or queries, the hop processes


# What the time of passes without their waits follows from.
WORK_EVENTS = frozenset({Event.ENTERED, Event.WAITING, Event.WAITED, Event.LEFT})


class Row(NamedTuple):
    """One event: its time, an Event, and the two integers that Event defines."""

    moment: int
    event: int
    a: int
    b: int


class RingLog:
    """A log in ``cells``, (1 + 4 x capacity,) int64: the number of rows written, then the rows."""

    COLUMNS = len(Row._fields)

    def __init__(self, cells: np.ndarray):
        self._count = cells[:1]
        self._rows = cells[1:].reshape(-1, self.COLUMNS)

    @staticmethod
    def cells(capacity: int) -> int:
        """Return how many integers a log of ``capacity`` rows takes."""
        return 1 + capacity * RingLog.COLUMNS

    @property
    def written(self) -> int:
        """Number of rows since the log was cleared, those that did not fit included."""
        return int(self._count[0])

    @property
    def is_full(self) -> bool:
        """Whether the next row would only be counted."""
        return self.written >= len(self._rows)

    def add(self, moment: int, event: Event, a: int, b: int) -> None:
        """Append a row, or only count it if the log is full."""
        count = self.written
        if count < len(self._rows):
            self._rows[count] = moment, event, a, b
        self._count[0] = count + 1

    def clear(self) -> None:
        """Remove all rows."""
        self._count[0] = 0

    @property
    def rows(self) -> np.ndarray:
        """The rows since the log was cleared: (rows, 4) int64, a copy."""
        return self._rows[: self.written].copy()

    @property
    def missed(self) -> int:
        """Number of rows that did not fit."""
        return max(0, self.written - len(self._rows))
