"""What a process did in its rings, moment by moment: rows of four numbers, written in order, read once a step.

A row is the moment, time.monotonic_ns(), what happened, and two numbers that say more of it. The rows lie in an array
of a fixed size, so that noting one neither allocates nor waits. What does not fit is counted.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np


class Event(IntEnum):
    """What happened, and what the row's ``a`` and ``b`` are."""

    ENTERED = 0  # a pass of the ring. a: the layer, b: the Direction
    HOP = 1  # began. a: which, from 1, b: of how many
    SENT = 2  # a message was handed over. a: its bytes, b: the receiver's global rank
    WAITING = 3  # for another process. a: its global rank
    WAITED = 4  # that wait is over
    RECEIVED = (
        5  # a message is here. a: the moment when its like was sent, b: the sender's global rank
    )
    LEFT = 6  # the pass is over
    OPTIMIZING = 7  # the optimizer's step began
    OPTIMIZED = 8  # and is over


class Row(NamedTuple):
    moment: int
    event: int
    a: int
    b: int


class RingLog:
    """A log in ``cells``, (1 + 4 x capacity,) int64: how many rows there were, then those that fit."""

    def __init__(self, cells: np.ndarray):
        self._count, self._rows = cells[:1], cells[1:].reshape(-1, len(Row._fields))

    @staticmethod
    def cells(capacity: int) -> int:
        """How many numbers a log of ``capacity`` rows takes."""
        return 1 + capacity * len(Row._fields)

    def add(self, moment: int, event: Event, a: int, b: int) -> None:
        count = int(self._count[0])
        if count < len(self._rows):
            self._rows[count] = moment, event, a, b
        self._count[0] = count + 1

    def clear(self) -> None:
        self._count[0] = 0

    @property
    def rows(self) -> np.ndarray:
        """(rows, 4) int64, a copy of those since the log was cleared."""
        return self._rows[: self._count[0]].copy()

    @property
    def missed(self) -> int:
        """How many more there were than fit."""
        return max(0, int(self._count[0]) - len(self._rows))
