"""Small checkpoints of tensors, as an imagined grid would have written them: 2 tensor ranks x ZeRO 3 on 3 ranks."""

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

TENSOR, ZERO = 2, 3


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Of odd sizes: a matrix, one with fewer rows than there are ranks, and a vector."""
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "embedding.weight": (7, 4),
        "blocks.0.mlp.down_proj.weight": (2, 5),
        "norm.weight": (5,),
    }
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def parts(kinds: dict[str, dict[str, torch.Tensor]]) -> list[list[Piece]]:
    """What each of the imagined processes holds; ``kinds``: the whole tensors of each kind."""
    shapes = {name: tuple(whole.shape) for name, whole in kinds[tensors.WEIGHT].items()}
    return [
        [
            Piece(
                name, box, {kind: whole[name][boxes.slices(box)] for kind, whole in kinds.items()}
            )
            for name, shape in shapes.items()
            for box in _held(shape, tensor_rank, zero_rank)
        ]
        for tensor_rank in range(TENSOR)
        for zero_rank in range(ZERO)
    ]


def _held(shape: tuple[int, ...], tensor_rank: int, zero_rank: int) -> list[boxes.Box]:
    """The rows of a tensor rank, and of their elements those of a ZeRO rank."""
    rows = _shares(shape[0], TENSOR)[tensor_rank]
    mine = (rows, *boxes.whole(shape[1:]))
    run = _shares(boxes.size(mine), ZERO)[zero_rank]
    return [boxes.moved(box, mine) for box in boxes.cut(tuple(map(len, mine)), run.start, run.stop)]


def _shares(length: int, ranks: int) -> list[range]:
    borders = [length * rank // ranks for rank in range(ranks + 1)]
    return [range(start, stop) for start, stop in pairwise(borders)]


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Have checkpoints written with values that are not finite, as earlier versions did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "check_finite", lambda *_: None)
        yield


def write(
    folder: Path,
    step: int,
    kinds: dict[str, dict[str, torch.Tensor]],
    config: Config | None = None,
    **made: str,
) -> Path:
    """A whole checkpoint; returns its folder. ``made``: what its state says of how it was made."""
    store.prepare(folder, step)
    partial = folder / names.partial_name(step)
    written = [
        tensors.write_part(partial, number, pieces) for number, pieces in enumerate(parts(kinds))
    ]
    shapes = {name: tuple(whole.shape) for name, whole in kinds[tensors.WEIGHT].items()}
    tensors.write_index(partial, shapes, kinds, written)
    state = RunState(
        step, consumed_samples=4 * step, vocab_size=7, seq_length=16, optimizer_steps=step, **made
    )
    return store.commit(
        folder, state, config or Config(), store.seal(folder, step, store.written(folder, step))
    )
