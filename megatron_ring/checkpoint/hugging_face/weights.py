"""The weights of a checkpoint of ours as a family of transformers' has them: one tensor in memory at a time."""

from dataclasses import dataclass

import torch

from megatron_ring.checkpoint import single_file
from megatron_ring.checkpoint.hugging_face import modules
from megatron_ring.checkpoint.hugging_face.modules import Module, Tensor
from megatron_ring.checkpoint.single_file import Entry
from megatron_ring.checkpoint.tensors import Tensors

STORED = "stored"


@dataclass(frozen=True)
class Weights:
    """theirs: every tensor that is to be written, by name, and which of ``stored`` it is made of.

    dtype: fp32, bf16, fp16 or stored, which is as they are.
    """

    stored: Tensors
    theirs: dict[str, Tensor]
    dtype: str

    @staticmethod
    def of(stored: Tensors, table: dict[str, Module], dtype: str) -> "Weights":
        """Of all parameters; ``table``: whose modules are whose."""
        return Weights(stored, modules.tensors(table, stored.shapes), dtype)

    def entries(self) -> list[Entry]:
        """What there is to be written, layer by layer."""
        return [
            Entry(name, self._type(tensor), tensor.shape) for name, tensor in self.theirs.items()
        ]

    def read(self, entry: Entry) -> torch.Tensor:
        """One of ``entries``, in the type that it has in the checkpoint."""
        tensor = self.theirs[entry.name]
        return tensor.put_together([self.stored.read(name) for name in tensor.parts])

    def _type(self, tensor: Tensor) -> torch.dtype:
        """The widest of its parts where it has several."""
        if self.dtype != STORED:
            return single_file.TYPES[self.dtype]
        return max(map(self.stored.dtype, tensor.parts), key=lambda dtype: dtype.itemsize)
