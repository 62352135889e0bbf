"""Mapping between the tensors of transformers' models and the parameters of ours.

A table has the module names of both, with ``{}`` for the layer number; the weight and the bias of a
module are mapped together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_ring.checkpoint.tensors import Shapes
from megatron_ring.errors import CheckpointError


@dataclass(frozen=True)
class Module:
    """The modules of ours that a module of theirs holds, concatenated along the output dimension.

    transposed: whether its weight is stored as (in, out).
    """

    ours: tuple[str, ...]
    transposed: bool = False


def module(name: str) -> Module:
    """Return a mapping to one of our modules, stored in the same form."""
    return Module((name,))


def conv1d(*names: str) -> Module:
    """Return a mapping to GPT-2's Conv1D, stored as (in, out).

    Queries, keys and values are one Conv1D.
    """
    return Module(names, transposed=True)


@dataclass(frozen=True)
class Tensor:
    """A tensor of theirs. parts: our parameters that it is made of, with their sizes in dim 0."""

    shape: tuple[int, ...]
    parts: dict[str, int]
    transposed: bool

    def split(self, theirs: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield our parameters by name; they are copies only if the order of elements differs."""
        whole = theirs.T if self.transposed else theirs
        sizes = list(self.parts.values())
        for name, part in zip(self.parts, whole.split(sizes), strict=True):
            yield name, part.contiguous()

    def join(self, ours: list[torch.Tensor]) -> torch.Tensor:
        """Return their tensor, given our parameters in the order of ``parts``."""
        whole = ours[0] if len(ours) == 1 else torch.cat(ours)
        return whole.T.contiguous() if self.transposed else whole


def tensors(table: dict[str, Module], shapes: Shapes) -> dict[str, Tensor]:
    """Return every tensor of theirs, by name, for a model whose parameters have ``shapes``.

    Tensors outside layers come first, then those of each layer. Raises CheckpointError if one of
    our parameters is in none of them.
    """
    layers = range(
        1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    )
    mapped: dict[str, Tensor] = {}
    for layer in (None, *layers):
        for theirs, ours in table.items():
            is_in_layer = "{}" in theirs
            if is_in_layer == (layer is not None):
                names = [name.format(layer) for name in ours.ours]
                mapped |= _tensors_of_module(theirs.format(layer), names, ours, shapes)
    left_over = shapes.keys() - {name for tensor in mapped.values() for name in tensor.parts}
    if left_over:
        raise CheckpointError(
            f"the Hugging Face family has no tensors for {', '.join(sorted(left_over))}. "
            "Set --family."
        )
    return mapped


def _tensors_of_module(
    theirs: str, ours: list[str], module: Module, shapes: Shapes
) -> dict[str, Tensor]:
    """Return the weight and the bias of a module, if the model has them."""
    mapped = {}
    for kind in ("weight", "bias"):
        first = f"{ours[0]}.{kind}"
        if first in shapes:
            parts = {f"{name}.{kind}": shapes[f"{name}.{kind}"][0] for name in ours}
            shape = (sum(parts.values()), *shapes[first][1:])
            transposed = module.transposed and kind == "weight"
            if transposed:
                shape = shape[::-1]
            mapped[f"{theirs}.{kind}"] = Tensor(shape, parts, transposed)
    return mapped
