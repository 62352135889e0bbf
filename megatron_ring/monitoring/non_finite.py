"""Locating non-finite values: in which layer and on which rank of a step they first appeared.

The report helps to find a broken device. A ring passes such values on with its keys and values, and
soon every rank has some. So each rank records, on its device and without synchronising with it,
whether the output of each layer and of its attention was finite, and the gradient of that output.
In forward, the values originated on the rank whose first non-finite layer comes earliest; in
backward, on the rank whose first is closest to the loss. Keys that become non-finite within an
attention reach all ranks at once; then all of them are named.
"""

import re
import socket
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from megatron_ring.model.recompute import is_recomputing
from megatron_ring.parallel.progress import Direction


@dataclass(frozen=True)
class NonFiniteReport:
    """What one rank recorded in one step.

    forward, backward: the layers whose output, or the gradient of it, was not finite. A layer has
    its number in the whole model; the attention within layer n is n - 0.5.
    """

    rank: int
    node: str
    finite_loss: bool
    forward: list[float]
    backward: list[float]

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.node})"


class NonFiniteDetector:
    """Records non-finite outputs and gradients of this process's layers of ``model``."""

    def __init__(self, model: nn.Module, device: torch.device):
        self._layers: list[float] = []
        for name, module in model.named_modules():
            if match := re.search(r"\bblocks\.(\d+)(\.attention)?$", name):
                module.register_forward_hook(partial(self._record_output, len(self._layers)))
                self._layers.append(int(match[1]) - 0.5 * bool(match[2]))
        # One number a direction and layer: 0 while everything was finite, else NaN.
        self._flags = torch.zeros(len(Direction), len(self._layers), device=device)

    def begin(self) -> None:
        """Reset the record at the start of a step."""
        self._flags.zero_()

    def seen(self, rank: int, loss: torch.Tensor) -> NonFiniteReport:
        """Return the report on the step since ``begin``; ``loss``: this rank's own.

        Synchronises with the device.
        """
        forward, backward = (
            [layer for layer, flag in zip(self._layers, flags) if flag != 0]
            for flags in self._flags.tolist()
        )
        return NonFiniteReport(rank, socket.gethostname(), bool(loss.isfinite()), forward, backward)

    def _record_output(
        self, index: int, _module: nn.Module, _inputs: tuple, output: torch.Tensor
    ) -> None:
        if is_recomputing():
            return  # the output, and the tensor whose gradient arrives, are those of forward
        self._record(Direction.FORWARD, index, output)
        if output.requires_grad:
            output.register_hook(lambda grad: self._record(Direction.BACKWARD, index, grad))

    def _record(self, direction: Direction, index: int, values: torch.Tensor) -> None:
        """Add 0 to the flag, or NaN if any value is not finite, in one pass over ``values``."""
        self._flags[direction, index] += values.detach().sum(dtype=torch.float32) * 0


def origin(reports: list[NonFiniteReport]) -> str:
    """Describe where non-finite values originated, from the reports of all ranks."""
    if first_layers := [min(report.forward) for report in reports if report.forward]:
        layer = min(first_layers)
        ranks = [report for report in reports if layer in report.forward]
        where = f"the output of {_describe_layer(layer)}"
    elif ranks := [report for report in reports if not report.finite_loss]:
        where = "the loss itself"
    elif last_layers := [max(report.backward) for report in reports if report.backward]:
        layer = max(last_layers)
        ranks = [report for report in reports if layer in report.backward]
        where = f"the gradient of the output of {_describe_layer(layer)}"
    else:
        return (
            "every layer's output and its gradient were finite: the non-finite values originated "
            "in a weight's gradient or in the reduction of gradients"
        )
    return f"non-finite values originated on {', '.join(map(str, ranks))}, in {where}"


def _describe_layer(layer: float) -> str:
    if layer % 1 == 0:
        return f"layer {layer:.0f}"
    return f"the attention of layer {layer + 0.5:.0f}"
