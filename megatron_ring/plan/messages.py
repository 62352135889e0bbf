"""Bytes that a process sends: in a hop of its ring, to its Ulysses group, its tensor group and the next stage.

Counted from the tensors' shapes, which are meta tensors here: nothing is computed or held.
"""

import math

import torch

from megatron_ring.config import Config
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.parallel.grid import Grid
from megatron_ring.plan.parameters import share


def ring_tensors(
    config: Config, grid: Grid, layout: Layout, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """q_BLhD and kv_2BLgD of a process as its ring sees them: H/(T x U) query heads, lcm(G/T, U)/U key-value heads."""
    model, batch = config.model, config.training.micro_batch_size
    heads, groups = (
        share(model.num_attention_heads, grid.tensor),
        share(model.key_value_heads, grid.tensor),
    )
    q_BLhD = (batch, layout.shard_length, share(heads, grid.ulysses), model.head_dim)
    kv_2BLgD = (
        2,
        batch,
        layout.shard_length,
        math.lcm(groups, grid.ulysses) // grid.ulysses,
        model.head_dim,
    )
    return torch.empty(q_BLhD, dtype=dtype, device="meta"), torch.empty(
        kv_2BLgD, dtype=dtype, device="meta"
    )


def ulysses_bytes(q_BLhD: torch.Tensor, kv_2BLgD: torch.Tensor, degree: int) -> tuple[int, int]:
    """Sent by a process of a group of ``degree`` in a layer's forward: before attention q, k, v, behind it out and lse.

    All but its own share of what it has, which is as much as it gets.
    """
    lse_bytes = torch.float32.itemsize * q_BLhD.shape[:-1].numel()
    before, behind = q_BLhD.nbytes + kv_2BLgD.nbytes, q_BLhD.nbytes + lse_bytes
    return before * (degree - 1) // degree, behind * (degree - 1) // degree


def tensor_bytes(stream_bytes: int, ranks: int, gathers_again: int) -> tuple[int, int]:
    """Bytes that a process sends to its tensor group in a layer's forward and in its backward.

    Each direction has two sums of the stream over the ranks, each a reduce-scatter and an
    all-gather, which sequence_parallel does at two places (Korthikanti et al. 2022, section 4.2.2).
    ``stream_bytes``: of (B, l, E). ``gathers_again``: how many inputs backward gathers once more
    because only a shard of them was kept.
    """
    shared = stream_bytes * (ranks - 1) // ranks
    return 4 * shared, (4 + gathers_again) * shared


def stage_bytes(
    stream_bytes: int, tokens: int, grid: Grid, sequence_parallel: bool
) -> tuple[int, int]:
    """Sent by a process to the next stage for a micro-batch, the stream, targets and positions; and back, gradients.

    Positions are one for each of the ``tokens`` of B samples, or of one sample where all have the same.
    """
    stream = stream_bytes // (grid.tensor if sequence_parallel else 1)
    return stream + 2 * torch.int64.itemsize * tokens, stream
