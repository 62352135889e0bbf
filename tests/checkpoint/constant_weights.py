"""Checkpoints of any model, without one: every weight is the same number."""

from dataclasses import replace
from pathlib import Path

import torch

from megatron_ring.checkpoint import names, store, tensors
from megatron_ring.checkpoint.hugging_face.parameters import parameters
from megatron_ring.checkpoint.state import RunState
from megatron_ring.config import Config, ModelConfig

VOCABULARY, LENGTH = 48, 32


def write(
    folder: Path,
    model: ModelConfig,
    value: float = 0.5,
    left_out: str = "",
    narrow: str = "-",
    **state,
) -> Path:
    """A checkpoint whose weights are all ``value``, in bfloat16 where ``narrow`` is in the name.

    ``state``: what its RunState has besides the sizes.
    """
    shapes = {
        name: shape
        for name, shape in parameters(model, VOCABULARY, LENGTH).items()
        if name != left_out
    }
    store.prepare(folder, 3)
    dtypes = {name: torch.bfloat16 if narrow in name else torch.float32 for name in shapes}
    values = (
        (name, torch.full(shape, value, dtype=dtypes[name])) for name, shape in shapes.items()
    )
    tensors.write_whole(folder / names.partial_name(3), shapes, values)
    sealed = store.seal(folder, 3, store.written(folder, 3))
    config = Config(model=model)
    config = replace(config, data=replace(config.data, seq_length=LENGTH))
    return store.commit(folder, RunState(3, 12, VOCABULARY, LENGTH, **state), config, sealed)
