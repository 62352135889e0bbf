"""Progress of this process, in a few integers: written by the training thread, read by monitoring.

The integers are in a tensor on the host, because the ring is a custom op, and a custom op takes
only tensors, numbers and strings (docs/decisions/0002). Recording is a write to memory: it takes no
lock, waits for no device and allocates nothing there. Values that are read together are written
together, so that another thread never sees half an update.

The tensor may have room for more than the progress: for the accumulated work in rings, which finds
stragglers, and for a log of all events (ring_log.py), which is a profile. An event without room for
it is not recorded.

Progress is that of the host, which on CUDA is ahead of the device. Work and log have the times at
which the device ran what was recorded (device_clock.py).
"""

import contextlib
import re
import time
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from megatron_ring.parallel.device_clock import DeviceClock
from megatron_ring.parallel.ring_log import Event, RingLog

NO_RANK = -1


class Direction(IntEnum):
    """Direction of a pass through the ring."""

    FORWARD = 0
    BACKWARD = 1


class ProgressSnapshot(NamedTuple):
    """What a process is doing, and for how long.

    Attributes:
        step: counted from 1; 0 before the first.
        layer: index as in parameter names, from 0 over all pipeline stages.
        direction: a Direction.
        hop: from 1, of ``hops``; both are 0 outside of the ring.
        seconds: how long it has been doing that.
        waits_for: the global rank it waits for, or NO_RANK.
    """

    step: int
    layer: int
    direction: int
    hop: int
    hops: int
    seconds: float
    waits_for: int

    def __str__(self) -> str:
        """Format as ``"has waited 31 s for rank 2 in step 12, layer 5, backward, hop 2 of 4"``."""
        if not self.hops:
            return f"has been outside of the ring for {self.seconds:.0f} s, in step {self.step}"
        direction = Direction(self.direction).name.lower()
        where = f"step {self.step}, layer {self.layer}, {direction}, hop {self.hop} of {self.hops}"
        if self.waits_for == NO_RANK:
            return f"has been at work for {self.seconds:.0f} s in {where}"
        return f"has waited {self.seconds:.0f} s for rank {self.waits_for} in {where}"


class RingWork(NamedTuple):
    """What a process has done in rings so far.

    Attributes:
        nanoseconds: time within passes, without waits.
        products: (query, key) pairs, each counted once per matrix product of its kernel.
    """

    nanoseconds: int
    products: int


_PROGRESS_FIELDS = len(ProgressSnapshot._fields)
_WORK_FIELDS = len(RingWork._fields)
_CLOCK_FIELDS = 1


class ProgressTracker:
    """Records the progress of this process in a tensor, and reads it from any thread.

    Attributes:
        buffer: int64 on the CPU. The first 7 are the fields of ProgressSnapshot, except that
            ``seconds`` is stored as the time.monotonic_ns() from which they count. Two for
            RingWork may follow, then the number of a DeviceClock or 0, then a log.
        accumulates_work: whether the buffer has room for RingWork.
        clock: the DeviceClock that times work and log on CUDA; None on a CPU.
        log: the RingLog in the buffer, or None.
    """

    def __init__(self, buffer: torch.Tensor | None = None):
        """Use ``buffer``, such as another tracker's; by default a new one, without work."""
        self.buffer = _new_buffer() if buffer is None else buffer
        cells = self.buffer.numpy()  # writing to it costs a tenth of writing to the tensor
        self._cells = cells[:_PROGRESS_FIELDS]
        after_progress = cells[_PROGRESS_FIELDS:]
        self._work = after_progress[:_WORK_FIELDS]
        self.accumulates_work = len(self._work) > 0
        after_work = after_progress[_WORK_FIELDS:]
        self.clock = DeviceClock.find(int(after_work[0])) if len(after_work) else None
        log = after_work[_CLOCK_FIELDS:]
        self.log = RingLog(log) if len(log) else None

    @staticmethod
    def with_work(log_rows: int = 0, clock: DeviceClock | None = None) -> "ProgressTracker":
        """Create a tracker that accumulates work, and keeps a log if ``log_rows`` is above 0.

        clock: what times work and log on CUDA; then work follows from a log.
        """
        assert log_rows or not clock, "on CUDA work follows from a log"
        log_cells = RingLog.cells(log_rows) if log_rows else 0
        buffer = _new_buffer(_WORK_FIELDS + _CLOCK_FIELDS + log_cells)
        buffer[_PROGRESS_FIELDS + _WORK_FIELDS] = clock.number if clock else 0
        return ProgressTracker(buffer)

    def read(self) -> ProgressSnapshot:
        """Return the current progress; may be called from any thread."""
        *fields, since, waits_for = self._cells.tolist()
        return ProgressSnapshot(*fields, (time.monotonic_ns() - since) / 1e9, waits_for)

    @property
    def work(self) -> RingWork:
        """The work of this process since it started."""
        return RingWork(*self._work.tolist())

    @property
    def layer(self) -> int:
        """The layer that was entered last."""
        return int(self._cells[ProgressSnapshot._fields.index("layer")])

    def track_steps(self, numbers: Iterable[int]) -> Iterator[int]:
        """Yield ``numbers``, recording each as the current step."""
        for number in numbers:
            self._write("step", number)
            yield number

    def track_layers(self, model: nn.Module) -> None:
        """Record from now on which of the model's ``blocks.N`` runs, recomputation included."""
        for name, module in model.named_modules():
            if number := re.search(r"\bblocks\.(\d+)$", name):
                module.register_forward_pre_hook(
                    lambda *_, layer=int(number[1]): self._write("layer", layer)
                )

    def begin_step(self) -> None:
        """Drop what was logged since the last step, as in a validation, and log the next one."""
        if self.log is not None:
            self.log.clear()
        if self.clock:
            self.clock.begin()

    def end_step(self) -> np.ndarray:
        """Return the step's log in host time, (rows, 4) int64; empty without a log.

        On CUDA the stream of the step must have been synchronised.
        """
        if self.log is None:
            return np.empty((0, RingLog.COLUMNS), dtype=np.int64)
        rows = self.log.rows
        if self.clock:
            rows[:, 0] = self.clock.end()[rows[:, 0]]
        return rows

    @contextlib.contextmanager
    def in_ring(self, layer: int, direction: Direction) -> Iterator[None]:
        """Record a pass of the ring; one that raises is not ended, so that it can still be read."""
        entered = self._log(Event.ENTERED, layer, direction)
        self._write("layer", layer, direction)
        yield
        left = self._log(Event.LEFT)
        self._write("hop", 0, 0, left, NO_RANK)
        self._add_host_time(left - entered)

    def begin_hop(self, hop: int, hops: int, source: int) -> None:
        """Record that ``hop``, counted from 0 as in the ring, begins.

        source: the ring rank whose keys, or queries if these travel, are processed.
        """
        self._write("hop", hop + 1, hops, self._log(Event.HOP, hop + 1, hops), NO_RANK)
        self._log(Event.SOURCE, source, at_last_mark=True)

    @contextlib.contextmanager
    def waiting_for(self, global_rank: int, follows_wait: bool = False) -> Iterator[None]:
        """Record a wait for another process. A wait that raises is not ended.

        follows_wait: nothing was done since the last wait, so on CUDA it takes no mark to begin.
        """
        began = self._log(Event.WAITING, global_rank, at_last_mark=follows_wait)
        self._write("seconds", began, global_rank)
        yield
        ended = self._log(Event.WAITED)
        self._write("seconds", ended, NO_RANK)
        self._add_host_time(began - ended)

    @contextlib.contextmanager
    def posting_to(self, global_rank: int) -> Iterator[None]:
        """Record that messages are posted, during which gloo may wait for the other process.

        On CUDA it is not logged: the device does nothing meanwhile.
        """
        if self.clock is None:
            with self.waiting_for(global_rank):
                yield
            return
        self._write("seconds", time.monotonic_ns(), global_rank)
        yield
        self._write("seconds", time.monotonic_ns(), NO_RANK)

    def record_send(self, size: int, receiver: int) -> int:
        """Record that a send of ``size`` bytes to a global rank starts.

        Returns the number of its row in the log, which identifies the transfer.
        """
        row = self.log.written if self.log is not None else 0
        self._log(Event.SENT, size, receiver)
        return row

    def record_receive(self, send_row: int, sender: int) -> None:
        """Record that the wait for a global rank's message, of the transfer ``send_row``, ended."""
        self._log(Event.RECEIVED, send_row, sender, at_last_mark=True)

    def add_products(self, products: int) -> None:
        """Add (query, key) pairs, each counted once per matrix product."""
        self._add_work(products=products)

    def add_device_time(self, seconds: float) -> None:
        """Add the time within passes, without waits, that the log of a step gives on CUDA."""
        self._add_work(round(seconds * 1e9))

    @contextlib.contextmanager
    def in_optimizer_step(self) -> Iterator[None]:
        """Record the optimizer's step."""
        self._log(Event.OPTIMIZING)
        yield
        self._log(Event.OPTIMIZED)

    def _log(self, event: Event, a: int = 0, b: int = 0, at_last_mark: bool = False) -> int:
        """Append to the log, if there is one, and return the host's time.

        at_last_mark: on CUDA, nothing was queued since the previous row, so its mark serves.
        """
        moment = time.monotonic_ns()
        if self.clock is None:
            if self.log is not None:
                self.log.add(moment, event, a, b)
        elif self.clock.is_running and event in self.clock.logged:
            reuses_mark = at_last_mark or self.log.is_full
            mark = self.clock.last_mark if reuses_mark else self.clock.mark()
            self.log.add(mark, event, a, b)
        return moment

    def _add_host_time(self, nanoseconds: int) -> None:
        if self.clock is None:
            self._add_work(nanoseconds)

    def _add_work(self, nanoseconds: int = 0, products: int = 0) -> None:
        if self.accumulates_work:
            self._work += nanoseconds, products

    def _write(self, first: str, *values: int) -> None:
        start = ProgressSnapshot._fields.index(first)
        self._cells[start : start + len(values)] = values


def _new_buffer(more: int = 0) -> torch.Tensor:
    """Return the integers of a process outside of the ring, and ``more`` zeros."""
    progress = torch.tensor([0, 0, 0, 0, 0, time.monotonic_ns(), NO_RANK])
    return torch.cat([progress, torch.zeros(more, dtype=progress.dtype)])
