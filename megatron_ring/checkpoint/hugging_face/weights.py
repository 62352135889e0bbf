"""The weights of a checkpoint of ours as a family of transformers' has them: one tensor in memory at a time."""

from pathlib import Path

import torch

from megatron_ring.checkpoint.hugging_face import modules
from megatron_ring.checkpoint.hugging_face.modules import Module
from megatron_ring.checkpoint.single_file import TYPES, Entry
from megatron_ring.checkpoint.tensors import Tensors

STORED = "stored"
_MAPPED_BYTES = 2**27


class Weights:
    """``table``: which modules are whose. ``dtype``: fp32, bf16, fp16 or stored, which is as they are.

    What was read of a mapped file counts as memory until the map is closed, so files are mapped anew now and then.
    """

    def __init__(self, checkpoint: Path, table: dict[str, Module], dtype: str):
        self._checkpoint, self._dtype = checkpoint, dtype
        self._stored, self._read_bytes = Tensors.open(checkpoint), 0
        self._tensors = modules.tensors(table, self._stored.shapes)

    def entries(self) -> list[Entry]:
        """What there is to be written, layer by layer."""
        return [Entry(name, self._type(name), tensor.shape) for name, tensor in self._tensors.items()]

    def read(self, entry: Entry) -> torch.Tensor:
        """One of ``entries``, in the type that it has in the checkpoint."""
        tensor = self._tensors[entry.name]
        return tensor.put_together([self._parameter(name) for name in tensor.parts])

    def _type(self, name: str) -> torch.dtype:
        """The widest of its parts where it has several."""
        if self._dtype != STORED:
            return TYPES[self._dtype]
        return max(map(self._stored.dtype, self._tensors[name].parts), key=lambda dtype: dtype.itemsize)

    def _parameter(self, name: str) -> torch.Tensor:
        if self._read_bytes > _MAPPED_BYTES:
            self._stored, self._read_bytes = Tensors.open(self._checkpoint), 0
        value = self._stored.read(name)
        self._read_bytes += value.nbytes
        return value
