"""Times on a CUDA device: events in a stream, read once a step, after the step's synchronisation.

The host only queues work and is far ahead of the device, so its own clock does not show when a hop
runs. An event that is recorded in the stream does: the device stamps it once everything queued
before it is done. Recording one blocks neither the host nor the stream. The events come from a pool
and are used again in every step.

A custom op gets a buffer of numbers and no objects (docs/decisions/0002), so the progress tracker
in it finds its clock by number, as the ring finds its communicators by name.
"""

import itertools
import time
import weakref
from collections.abc import Callable, Container
from typing import Protocol

import numpy as np
import torch


class TimedEvent(Protocol):
    """The part of torch.cuda.Event, with timing, that is used here."""

    def record(self) -> None:
        """Record the event in the current stream of the calling thread."""

    def elapsed_time(self, end: "TimedEvent") -> float:
        """Return the milliseconds from this event to ``end``; raises if one is not complete."""


def cuda_event() -> TimedEvent:
    """Return a new CUDA event with timing."""
    return torch.cuda.Event(enable_timing=True)


class DeviceClock:
    """Marks positions in a stream, and reads the times at which the device reached them.

    All marks of a step must be in the same stream, that of the training step. A step begins with
    ``begin`` and ends with ``end``; between steps, as in a validation, nothing is marked.

    Attributes:
        number: identifies the clock in this process; above 0.
        logged: the events of the ring log that get a mark; others are not logged.
        is_running: whether a step has begun and not ended.
    """

    def __init__(
        self,
        logged: Container[int],
        new_event: Callable[[], TimedEvent] = cuda_event,
        host_time: Callable[[], int] = time.monotonic_ns,
    ):
        self.number = next(_numbers)
        self.logged = logged
        self.is_running = False
        self._new_event = new_event
        self._host_time = host_time
        self._anchor: TimedEvent | None = None
        self._anchored_at = 0
        self._pool: list[TimedEvent] = []
        self._marks = 0
        _clocks[self.number] = self

    @staticmethod
    def find(number: int) -> "DeviceClock | None":
        """Return the clock with this number; None for 0, and for a clock that is gone."""
        return _clocks.get(number)

    def begin(self) -> None:
        """Begin a step: relate the device's time to the host's, and start marking.

        The device is idle between steps, so it reaches the anchor as soon as that is recorded: the
        two clocks are aligned to the time that recording takes, microseconds.
        """
        self._anchor = self._anchor or self._new_event()
        self._anchor.record()
        self._anchored_at = self._host_time()
        self._marks = 0
        self.is_running = True

    def mark(self) -> int:
        """Mark the current position in the stream; returns the number of the mark in this step."""
        if self._marks == len(self._pool):
            self._pool.append(self._new_event())
        self._pool[self._marks].record()
        self._marks += 1
        return self._marks - 1

    @property
    def last_mark(self) -> int:
        """The number of the step's latest mark."""
        return self._marks - 1

    def end(self) -> np.ndarray:
        """End the step; return the host time of each of its marks in nanoseconds, (marks,) int64.

        The stream must have been synchronised since the last mark. CUDA's times are exact to about
        half a microsecond, and to one after ten seconds, because they are milliseconds in float32.
        """
        self.is_running = False
        since_anchor = [self._anchor.elapsed_time(event) for event in self._pool[: self._marks]]
        return self._anchored_at + np.rint(np.array(since_anchor) * 1e6).astype(np.int64)


_numbers = itertools.count(1)
_clocks: "weakref.WeakValueDictionary[int, DeviceClock]" = weakref.WeakValueDictionary()
