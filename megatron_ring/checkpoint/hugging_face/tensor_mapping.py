"""Whose weights are whose: the modules of transformers' models by name, and ours that hold the same numbers.

A table has a module's name on either side, ``{}`` for the layer; its weight and its bias go together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_ring.checkpoint.tensors import Shapes
from megatron_ring.errors import CheckpointError


@dataclass(frozen=True)
class Module:
    """Ours, and how theirs holds it: the weights of several one after another, rows and columns exchanged."""

    ours: tuple[str, ...]
    transposed: bool = False


def module(name: str) -> Module:
    """One of ours, held as it is."""
    return Module((name,))


def conv1d(*names: str) -> Module:
    """GPT-2's Conv1D: (in, out), and one for queries, keys and values side by side."""
    return Module(names, transposed=True)


@dataclass(frozen=True)
class Tensor:
    """One of their tensors: its shape, and the names and sizes along dim 0 of our parameters that it is made of."""

    shape: tuple[int, ...]
    parts: dict[str, int]
    transposed: bool

    def split(self, theirs: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Our parameters; copies only where the order of elements is another."""
        whole = theirs.T if self.transposed else theirs
        for name, part in zip(self.parts, whole.split(list(self.parts.values())), strict=True):
            yield name, part.contiguous()

    def put_together(self, ours: list[torch.Tensor]) -> torch.Tensor:
        """Their tensor, of our parameters in the order of ``parts``."""
        whole = ours[0] if len(ours) == 1 else torch.cat(ours)
        return whole.T.contiguous() if self.transposed else whole


def tensors(table: dict[str, Module], shapes: Shapes) -> dict[str, Tensor]:
    """Every tensor of theirs, by name, for a model whose parameters have ``shapes``. None of ours may be left over.

    What is in no layer comes first, then layer by layer.
    """
    layers = range(
        1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    )
    found: dict[str, Tensor] = {}
    for layer in (None, *layers):
        for theirs, ours in table.items():
            if ("{}" in theirs) == (layer is not None):
                found |= _of_module(
                    theirs.format(layer), [name.format(layer) for name in ours.ours], ours, shapes
                )
    left = shapes.keys() - {name for tensor in found.values() for name in tensor.parts}
    if left:
        raise CheckpointError(
            f"the Hugging Face family has no tensors for {', '.join(sorted(left))}. Set --family."
        )
    return found


def _of_module(theirs: str, ours: list[str], module: Module, shapes: Shapes) -> dict[str, Tensor]:
    """Its weight and its bias, as far as the model has them."""
    found = {}
    for kind in ("weight", "bias"):
        if f"{ours[0]}.{kind}" in shapes:
            parts = {f"{name}.{kind}": shapes[f"{name}.{kind}"][0] for name in ours}
            shape = (sum(parts.values()), *shapes[f"{ours[0]}.{kind}"][1:])
            transposed = module.transposed and kind == "weight"
            found[f"{theirs}.{kind}"] = Tensor(
                shape[::-1] if transposed else shape, parts, transposed
            )
    return found
