"""Small checkpoints of tensors as a grid of 2 tensor ranks x ZeRO 3 on 3 ranks would write them."""

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_ring.checkpoint import boxes, names, store, tensors
from megatron_ring.checkpoint.state import RunState
from megatron_ring.checkpoint.tensors import Piece
from megatron_ring.config import Config

TENSOR = 2
ZERO = 3


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return tensors of odd sizes: a matrix, one with fewer rows than ranks, and a vector."""
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "embedding.weight": (7, 4),
        "blocks.0.mlp.down_proj.weight": (2, 5),
        "norm.weight": (5,),
    }
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def parts(kinds: dict[str, dict[str, torch.Tensor]]) -> list[list[Piece]]:
    """Return the pieces of each process. ``kinds``: the whole tensors of each kind."""
    return [
        _pieces(kinds, tensor_rank, zero_rank)
        for tensor_rank in range(TENSOR)
        for zero_rank in range(ZERO)
    ]


def _pieces(
    kinds: dict[str, dict[str, torch.Tensor]], tensor_rank: int, zero_rank: int
) -> list[Piece]:
    pieces = []
    for name, weight in kinds[tensors.WEIGHT].items():
        for box in _boxes(tuple(weight.shape), tensor_rank, zero_rank):
            values = {kind: whole[name][boxes.slices(box)] for kind, whole in kinds.items()}
            pieces.append(Piece(name, box, values))
    return pieces


def _boxes(shape: tuple[int, ...], tensor_rank: int, zero_rank: int) -> list[boxes.Box]:
    """Return a ZeRO rank's boxes of the rows of a tensor rank."""
    rows = _shares(shape[0], TENSOR)[tensor_rank]
    of_tensor_rank = (rows, *boxes.whole(shape[1:]))
    elements = _shares(boxes.size(of_tensor_rank), ZERO)[zero_rank]
    shape_of_rank = tuple(map(len, of_tensor_rank))
    return [
        boxes.moved(box, of_tensor_rank)
        for box in boxes.cut(shape_of_rank, elements.start, elements.stop)
    ]


def _shares(length: int, ranks: int) -> list[range]:
    borders = [length * rank // ranks for rank in range(ranks + 1)]
    return [range(start, stop) for start, stop in pairwise(borders)]


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Allow checkpoints with non-finite values to be written, as earlier versions did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "check_finite", lambda *_: None)
        yield


def write(
    folder: Path,
    step: int,
    kinds: dict[str, dict[str, torch.Tensor]],
    config: Config | None = None,
    **provenance: str,
) -> Path:
    """Write a complete checkpoint and return its folder. ``provenance``: fields of its state."""
    store.prepare(folder, step)
    partial = folder / names.partial_name(step)
    written = [
        tensors.write_part(partial, number, pieces) for number, pieces in enumerate(parts(kinds))
    ]
    shapes = {name: tuple(whole.shape) for name, whole in kinds[tensors.WEIGHT].items()}
    tensors.write_index(partial, shapes, kinds, written)
    state = RunState(
        step,
        consumed_samples=4 * step,
        vocab_size=7,
        seq_length=16,
        optimizer_steps=step,
        **provenance,
    )
    records = store.flush_and_checksum(folder, step, store.written(folder, step))
    return store.commit(folder, state, config or Config(), records)
