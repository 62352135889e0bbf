"""Bytes that a process sends: in a ring hop, to Ulysses and tensor groups, to the next stage.

Counted from tensor shapes, of tensors on the meta device: nothing is computed or allocated.
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
    """Return q_BLhD and kv_2BLgD of a process as its ring gets them, on the meta device.

    They have H/(T x U) query heads and lcm(G/T, U)/U key-value heads.
    """
    model = config.model
    batch = config.training.micro_batch_size
    length = layout.shard_length
    heads = share(share(model.num_attention_heads, grid.tensor), grid.ulysses)
    groups = math.lcm(share(model.key_value_heads, grid.tensor), grid.ulysses) // grid.ulysses
    q_BLhD = torch.empty(batch, length, heads, model.head_dim, dtype=dtype, device="meta")
    kv_2BLgD = torch.empty(2, batch, length, groups, model.head_dim, dtype=dtype, device="meta")
    return q_BLhD, kv_2BLgD


def ulysses_bytes(q_BLhD: torch.Tensor, kv_2BLgD: torch.Tensor, degree: int) -> tuple[int, int]:
    """Return the bytes that a process sends in a layer's forward, before and after attention.

    In a group of ``degree`` processes these are q, k, v before, output and lse after, each except
    the process's own share. It receives as many.
    """
    lse_bytes = torch.float32.itemsize * q_BLhD.shape[:-1].numel()
    before = q_BLhD.nbytes + kv_2BLgD.nbytes
    after = q_BLhD.nbytes + lse_bytes
    return before * (degree - 1) // degree, after * (degree - 1) // degree


def tensor_bytes(stream_bytes: int, ranks: int, gathers_again: int) -> tuple[int, int]:
    """Return the bytes that a process sends to its tensor group in a layer's forward and backward.

    Each direction has two sums of the stream over the ranks, each a reduce-scatter and an
    all-gather, which sequence_parallel does at two places (Korthikanti et al. 2022, section 4.2.2).

    ``stream_bytes``: of (B, l, E). ``gathers_again``: how many inputs backward gathers once more
    because only a shard of them was kept.
    """
    bytes_per_collective = stream_bytes * (ranks - 1) // ranks
    return 4 * bytes_per_collective, (4 + gathers_again) * bytes_per_collective


def stage_bytes(
    stream_bytes: int, tokens: int, grid: Grid, sequence_parallel: bool
) -> tuple[int, int]:
    """Return the bytes sent to the next stage for a micro-batch, and those sent back.

    Forward sends the stream, targets and positions, back comes the stream's gradient. Positions are
    one for each of the ``tokens`` of B samples, or of one sample where all have the same.
    """
    stream = stream_bytes // (grid.tensor if sequence_parallel else 1)
    targets_and_positions = 2 * torch.int64.itemsize * tokens
    return stream + targets_and_positions, stream
