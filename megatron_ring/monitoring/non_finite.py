"""The lookout: where in a step values first were not finite, on which rank, for who must find the broken device.

A ring hands such values on with its keys and values, and soon every rank has some. So each rank notes, on its device
and without waiting for it, whether what each layer and its attention gave was finite, and the gradient of that. Forward
the rank whose first is earliest is where it began, backward the one whose first is closest to the loss. Keys that go
bad within an attention are on all ranks at once, which are then all named.
"""

import re
import socket
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from megatron_ring.parallel.progress import Direction


@dataclass(frozen=True)
class NonFiniteReport:
    """By one rank in one step. forward, backward: the layers whose output, or its gradient, was not finite.

    A layer's number is that of the whole model, less a half for its attention.
    """

    rank: int
    node: str
    finite_loss: bool
    forward: list[float]
    backward: list[float]

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.node})"


class NonFiniteDetector:
    """Over this process's layers of ``model``."""

    def __init__(self, model: nn.Module, device: torch.device):
        self._places: list[float] = []
        for name, module in model.named_modules():
            if found := re.search(r"\bblocks\.(\d+)(\.attention)?$", name):
                module.register_forward_hook(partial(self._note, len(self._places)))
                self._places.append(int(found[1]) - 0.5 * bool(found[2]))
        self._sums = torch.zeros(len(Direction), len(self._places), device=device)

    def begin(self) -> None:
        """Forget what was before the step that comes now."""
        self._sums.zero_()

    def seen(self, rank: int, loss: torch.Tensor) -> NonFiniteReport:
        """Since ``begin``; ``loss``: this rank's own."""
        forward, backward = (
            [place for place, total in zip(self._places, sums) if total != 0]
            for sums in self._sums.tolist()
        )
        return NonFiniteReport(rank, socket.gethostname(), bool(loss.isfinite()), forward, backward)

    def _note(self, at: int, _module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        self._add(Direction.FORWARD, at, output)
        if output.requires_grad:
            output.register_hook(lambda gradient: self._add(Direction.BACKWARD, at, gradient))

    def _add(self, direction: Direction, at: int, given: torch.Tensor) -> None:
        """0, or nan if anything in ``given`` is not finite: one pass over it."""
        self._sums[direction, at] += given.detach().sum(dtype=torch.float32) * 0


def origin(reports: list[NonFiniteReport]) -> str:
    """Where it began, from what all ranks have seen."""
    if firsts := [min(seen.forward) for seen in reports if seen.forward]:
        where, there = (
            f"what {_layer(min(firsts))} gave",
            [s for s in reports if min(firsts) in s.forward],
        )
    elif there := [seen for seen in reports if not seen.finite_loss]:
        where = "the loss itself"
    elif lasts := [max(seen.backward) for seen in reports if seen.backward]:
        where = f"the gradient of what {_layer(max(lasts))} gave"
        there = [seen for seen in reports if max(lasts) in seen.backward]
    else:
        return (
            "every layer's output and its gradient were finite: "
            "it began in a weight's gradient or their sum"
        )
    return f"it began on {', '.join(map(str, there))}, in {where}"


def _layer(place: float) -> str:
    return f"layer {place:.0f}" if place % 1 == 0 else f"the attention of layer {place + 0.5:.0f}"
