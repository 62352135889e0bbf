"""Checkpoints of any model configuration in which all weights have the same value."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megatron_ring.checkpoint import names, store, tensors
from megatron_ring.checkpoint.state import RunState
from megatron_ring.config import Config, ModelConfig
from megatron_ring.model.shapes import parameter_shapes

VOCABULARY = 48
LENGTH = 32


def write(
    folder: Path,
    model: ModelConfig,
    value: float = 0.5,
    left_out: str = "",
    narrow: str = "-",
    **state,
) -> Path:
    """Write a checkpoint of step 3 and return its folder.

    Weights are bfloat16 if ``narrow`` is in their name, otherwise float32. The parameter
    ``left_out`` is missing. ``state``: further fields of its RunState.
    """
    shapes = parameter_shapes(model, VOCABULARY, LENGTH)
    shapes.pop(left_out, None)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes.items():
            dtype = torch.bfloat16 if narrow in name else torch.float32
            yield name, torch.full(shape, value, dtype=dtype)

    store.prepare(folder, 3)
    tensors.write_whole(folder / names.partial_name(3), shapes, weights())
    records = store.flush_and_checksum(folder, 3, store.written(folder, 3))
    config = Config(model=model)
    config = replace(config, data=replace(config.data, seq_length=LENGTH))
    return store.commit(folder, RunState(3, 12, VOCABULARY, LENGTH, **state), config, records)
