"""Where this process is, in a few numbers: written by whoever trains, read by whoever watches.

The numbers lie in a tensor on the host, because the ring is an operator, and what an operator is given are tensors,
numbers and text (docs/decisions/0002). A note is a write to memory: it takes no lock, waits for no device and allocates
nothing there. What is read together is written together, so that another thread never sees half a note.
"""

import contextlib
import re
import time
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import nn

NOBODY = -1


class Direction(IntEnum):
    FORWARD = 0
    BACKWARD = 1


class Place(NamedTuple):
    """What a process does, and for how many ``seconds`` it has done that.

    step: counted from 1, 0 before the first; layer: as parameters' names count it, from 0 over all pipeline stages;
    hop: of ``hops``, from 1, and 0 of 0 outside of the ring; waits_for: a global rank, or NOBODY.
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
        if self.waits_for == NOBODY:
            return f"has been at work for {self.seconds:.0f} s in {where}"
        return f"has waited {self.seconds:.0f} s for rank {self.waits_for} in {where}"


class Whereabouts:
    """A Place that is kept up to date. ``numbers``: (7,) int64 on the CPU, one for each of Place's; None: new ones.

    In the place of seconds they have the moment, time.monotonic_ns(), from which these count.
    """

    def __init__(self, numbers: torch.Tensor | None = None):
        self.numbers = torch.tensor([0, 0, 0, 0, 0, time.monotonic_ns(), NOBODY]) if numbers is None else numbers
        self._cells = self.numbers.numpy()  # writing there costs a tenth of writing to the tensor

    def read(self) -> Place:
        """Where this process is now; from any thread."""
        *place, since, waits_for = self._cells.tolist()
        return Place(*place, (time.monotonic_ns() - since) / 1e9, waits_for)

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
                module.register_forward_pre_hook(lambda *_, layer=int(number[1]): self._write("layer", layer))

    @contextlib.contextmanager
    def in_ring(self, layer: int, direction: Direction) -> Iterator[None]:
        """Around a pass of the ring. One that fails is never left: what it was at can still be read."""
        self._write("layer", layer, direction)
        yield
        self._write("hop", 0, 0, time.monotonic_ns(), NOBODY)

    def begin_hop(self, hop: int, hops: int) -> None:
        """``hop`` counts from 0, as the ring does."""
        self._write("hop", hop + 1, hops, time.monotonic_ns(), NOBODY)

    @contextlib.contextmanager
    def waiting_for(self, global_rank: int) -> Iterator[None]:
        """Around what another process can hold up. A wait that fails is never over."""
        self._write("seconds", time.monotonic_ns(), global_rank)
        yield
        self._write("seconds", time.monotonic_ns(), NOBODY)

    def _write(self, first: str, *values: int) -> None:
        at = Place._fields.index(first)
        self._cells[at : at + len(values)] = values
