"""Where this process is, in a few numbers: written by whoever trains, read by whoever watches.

The numbers lie in a tensor on the host, because the ring is an operator, and what an operator is given are tensors,
numbers and text (docs/decisions/0002). A note is a write to memory: it takes no lock, waits for no device and allocates
nothing there. What is read together is written together, so that another thread never sees half a note.

Behind the place there may be room for more: for the sum of the work done in rings, which finds stragglers, and for a
log of all that is noted (ring_log.py), which is a profile. A note that finds no room for itself is not kept.
"""

import contextlib
import re
import time
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import nn

from megatron_ring.parallel.ring_log import Event, RingLog

NO_RANK = -1


class Direction(IntEnum):
    FORWARD = 0
    BACKWARD = 1


class Place(NamedTuple):
    """What a process does, and for how many ``seconds`` it has done that.

    step: counted from 1, 0 before the first; layer: as parameters' names count it, from 0 over all pipeline stages;
    hop: of ``hops``, from 1, and 0 of 0 outside of the ring; waits_for: a global rank, or NO_RANK.
    """

    step: int
    layer: int
    direction: int
    hop: int
    hops: int
    seconds: float
    waits_for: int

    def __str__(self) -> str:
        """As in ``"has waited 31 s for rank 2 in step 12, layer 5, backward, hop 2 of 4"``."""
        if not self.hops:
            return f"has been outside of the ring for {self.seconds:.0f} s, in step {self.step}"
        direction = Direction(self.direction).name.lower()
        where = f"step {self.step}, layer {self.layer}, {direction}, hop {self.hop} of {self.hops}"
        if self.waits_for == NO_RANK:
            return f"has been at work for {self.seconds:.0f} s in {where}"
        return f"has waited {self.seconds:.0f} s for rank {self.waits_for} in {where}"


class Work(NamedTuple):
    """What a process has done in rings so far.

    nanoseconds: within passes, but for waits. products: (query, key) pairs that it multiplied, each as often as it did.
    """

    nanoseconds: int
    products: int


_PLACE, _WORK = len(Place._fields), len(Work._fields)


class ProgressTracker:
    """A Place that is kept up to date. ``numbers``: int64 on the CPU, the first 7 one for each of Place's.

    In the place of seconds they have the moment, time.monotonic_ns(), from which these count. Behind them may be two
    for Work, and behind those a log. None: new ones, for a Place alone. adds_work_up: whether there is room for Work.
    """

    def __init__(self, numbers: torch.Tensor | None = None):
        self.numbers = _fresh_numbers(0) if numbers is None else numbers
        cells = self.numbers.numpy()  # writing there costs a tenth of writing to the tensor
        self._cells, self._work, log = (
            cells[:_PLACE],
            cells[_PLACE : _PLACE + _WORK],
            cells[_PLACE + _WORK :],
        )
        self.adds_work_up = len(self._work) > 0
        self.log = RingLog(log) if len(log) else None

    @staticmethod
    def with_work(log_rows: int = 0) -> "ProgressTracker":
        """One that adds up its work, and with ``log_rows`` keeps a log of so many."""
        return ProgressTracker(_fresh_numbers(_WORK + (RingLog.cells(log_rows) if log_rows else 0)))

    def read(self) -> Place:
        """Where this process is now; from any thread."""
        *place, since, waits_for = self._cells.tolist()
        return Place(*place, (time.monotonic_ns() - since) / 1e9, waits_for)

    @property
    def work(self) -> Work:
        """Of this process, since it began."""
        return Work(*self._work.tolist())

    @property
    def layer(self) -> int:
        """The layer that was entered last."""
        return int(self._cells[Place._fields.index("layer")])

    def steps(self, numbers: Iterable[int]) -> Iterator[int]:
        """``numbers``, each the step from when it is taken."""
        for number in numbers:
            self._write("step", number)
            yield number

    def follow(self, model: nn.Module) -> None:
        """Know from now on which of the model's ``blocks.N`` was entered last, computed again or not."""
        for name, module in model.named_modules():
            if number := re.search(r"\bblocks\.(\d+)$", name):
                module.register_forward_pre_hook(
                    lambda *_, layer=int(number[1]): self._write("layer", layer)
                )

    @contextlib.contextmanager
    def in_ring(self, layer: int, direction: Direction) -> Iterator[None]:
        """Around a pass of the ring. One that fails is never left: what it was at can still be read."""
        entered = self._note(Event.ENTERED, layer, direction)
        self._write("layer", layer, direction)
        yield
        left = self._note(Event.LEFT)
        self._write("hop", 0, 0, left, NO_RANK)
        self._add_work(left - entered)

    def begin_hop(self, hop: int, hops: int) -> None:
        """``hop`` counts from 0, as the ring does."""
        self._write("hop", hop + 1, hops, self._note(Event.HOP, hop + 1, hops), NO_RANK)

    @contextlib.contextmanager
    def waiting_for(self, global_rank: int) -> Iterator[None]:
        """Around what another process can hold up. A wait that fails is never over."""
        began = self._note(Event.WAITING, global_rank)
        self._write("seconds", began, global_rank)
        yield
        over = self._note(Event.WAITED)
        self._write("seconds", over, NO_RANK)
        self._add_work(began - over)

    def sends(self, size: int, receiver: int) -> int:
        """``size`` bytes to a global rank; returns the moment, by which ``received`` knows the transfer."""
        return self._note(Event.SENT, size, receiver)

    def received(self, sent_at: int, sender: int) -> None:
        """What a global rank sent, in the transfer that began when ``sends`` said."""
        self._note(Event.RECEIVED, sent_at, sender)

    def multiplies(self, products: int) -> None:
        """So many pairs of a query and a key, each product of the two counted."""
        self._add_work(products=products)

    @contextlib.contextmanager
    def optimizing(self) -> Iterator[None]:
        """Around the optimizer's step."""
        self._note(Event.OPTIMIZING)
        yield
        self._note(Event.OPTIMIZED)

    def _note(self, event: Event, a: int = 0, b: int = 0) -> int:
        """The moment, noted where there is a log."""
        moment = time.monotonic_ns()
        if self.log is not None:
            self.log.add(moment, event, a, b)
        return moment

    def _add_work(self, nanoseconds: int = 0, products: int = 0) -> None:
        if self.adds_work_up:
            self._work += nanoseconds, products

    def _write(self, first: str, *values: int) -> None:
        at = Place._fields.index(first)
        self._cells[at : at + len(values)] = values


def _fresh_numbers(room: int) -> torch.Tensor:
    """Those of a Place outside of the ring, and ``room`` more."""
    place = torch.tensor([0, 0, 0, 0, 0, time.monotonic_ns(), NO_RANK])
    return torch.cat([place, torch.zeros(room, dtype=place.dtype)])
