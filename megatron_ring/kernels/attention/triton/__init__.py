"""One hop in Triton, for key ranges as they are: any layout, with documents or windows.

Programs run for the tiles in which something is visible (tile_lists.py); blocks that all rows of a
tile see completely are computed without a mask, unless there are few. State and gradients are
float32, read and written in place. Inputs and gradients may be some heads of larger tensors. The
block sizes are a small table (blocks.py), not a search.

Backward is one kernel that adds dQ atomically. Where results must be reproducible it is two kernels
with a fixed order of additions (docs/decisions/0024).
"""

import torch

from megatron_ring.kernels.attention.hop_kernel import GradientAccumulators, HopInputs
from megatron_ring.kernels.attention.running_softmax import Output, RunningSoftmax, delta_of
from megatron_ring.kernels.attention.triton.backward_kernels import (
    backward_hop_keys,
    backward_hop_queries,
)
from megatron_ring.kernels.attention.triton.blocks import (
    Generation,
    blocks_for,
    generation_of,
    has_fused_backward,
)
from megatron_ring.kernels.attention.triton.forward_kernel import LOG2_E, forward_hop


def forward(inputs: HopInputs, state: RunningSoftmax) -> None:
    """As in ``HopKernel``."""
    q_BLHD, k_BLGD, v_BLGD, key_ranges, scale = inputs
    q, (k, v) = _readable(q_BLHD), _readable_pair(k_BLGD, v_BLGD)
    in_place = state.out_BLHD.is_contiguous() and state.lse_BHL.is_contiguous()
    assert in_place, "the state is updated in place and must be contiguous"
    batch, queries, heads, head_dim = q.shape
    sizes = blocks_for("forward", head_dim, generation_of(q.device))
    tiles = key_ranges.query_tiles(sizes.block_q, sizes.block_k, q.device)
    if not len(tiles):
        return
    forward_hop[heads, len(tiles), batch](
        q, k, v, state.out_BLHD, state.lse_BHL, *key_ranges.bounds(q.device), tiles,
        queries, k.shape[1], heads, k.shape[2], _stride_in_heads(q), _stride_in_heads(k),
        scale * LOG2_E.value, **sizes.settings(head_dim),
    )  # fmt: skip


def backward(
    inputs: HopInputs,
    dout_BLHD: torch.Tensor,
    out: Output,
    lse_BHL: torch.Tensor,
    accumulators: GradientAccumulators,
) -> None:
    """As in ``HopKernel``, with one kernel, or two that add in a fixed order."""
    q_BLHD, k_BLGD, v_BLGD, key_ranges, scale = inputs
    (dout, q), (k, v) = _readable_pair(dout_BLHD, q_BLHD), _readable_pair(k_BLGD, v_BLGD)
    dq, dk, dv = accumulators
    batch, queries, heads, head_dim = q.shape
    keys, groups = k.shape[1:3]
    read = (dout, q, k, v, _log2(lse_BHL), delta_of(out, dout_BLHD).contiguous())
    shape = (queries, keys, heads, groups)
    strides = tuple(map(_stride_in_heads, (q, k, dq)))
    stride_of_dkv = _stride_in_heads(dk, dv)
    in_place = strides[-1] and stride_of_dkv
    assert in_place, "gradients must be contiguous, or some heads of contiguous tensors"
    generation = generation_of(q.device)
    adds_dq = adds_dq_atomically(dq, generation)
    if not adds_dq:
        sizes = blocks_for("queries", head_dim, generation)
        tiles = key_ranges.query_tiles(sizes.block_q, sizes.block_k, q.device)
        if len(tiles):
            backward_hop_queries[heads, len(tiles), batch](
                *read, *key_ranges.bounds(q.device), tiles, dq, *shape, *strides, scale,
                **sizes.settings(head_dim),
            )  # fmt: skip
    sizes = blocks_for("fused" if adds_dq else "keys", head_dim, generation)
    tiles = key_ranges.key_tiles(keys, sizes.block_k, sizes.block_q, q.device)
    if len(tiles):
        backward_hop_keys[groups, len(tiles), batch](
            *read, *key_ranges.query_ranges(keys, q.device), tiles, dq, dk, dv, *shape, *strides,
            stride_of_dkv, scale, **sizes.settings(head_dim), ADDS_DQ=adds_dq,
        )  # fmt: skip


def adds_dq_atomically(dq_BLHD: torch.Tensor, generation: Generation) -> bool:
    """Return whether backward runs the fused kernel, whose sums in dq have no fixed order.

    It does not under ``torch.use_deterministic_algorithms``, for sums that are not float32, and for
    head dims that the table of blocks has no fused kernel for.
    """
    return (
        not torch.are_deterministic_algorithms_enabled()
        and dq_BLHD.dtype == torch.float32
        and has_fused_backward(dq_BLHD.shape[-1], generation)
    )


def _log2(lse_BHL: torch.Tensor) -> torch.Tensor:
    """Convert to base 2; +inf for queries that saw nothing, which gives them no weight."""
    return (lse_BHL * LOG2_E.value).nan_to_num_(torch.nan, torch.inf, torch.inf).contiguous()


def _readable(x_BLHD: torch.Tensor) -> torch.Tensor:
    """Return ``x``, or a copy if it is not contiguous or some heads of a contiguous tensor."""
    return x_BLHD if _stride_in_heads(x_BLHD) else x_BLHD.contiguous()


def _readable_pair(x_BLHD: torch.Tensor, y_BLHD: torch.Tensor) -> list[torch.Tensor]:
    """Return both as ``_readable`` does, with the same distance of two tokens."""
    same = _stride_in_heads(x_BLHD, y_BLHD) > 0
    return [x if same else x.contiguous() for x in (x_BLHD, y_BLHD)]


def _stride_in_heads(*tensors_BLHD: torch.Tensor) -> int:
    """Return the distance of two tokens in memory, in heads, or 0 if kernels cannot access them.

    They can if all are contiguous, or the same heads of contiguous tensors.
    """
    strides = {_one_stride_in_heads(x) for x in tensors_BLHD}
    return strides.pop() if len(strides) == 1 else 0


def _one_stride_in_heads(x_BLHD: torch.Tensor) -> int:
    batch, tokens, heads, head_dim = x_BLHD.shape
    if x_BLHD.is_contiguous():
        return heads
    sample_stride, token_stride, head_stride, element_stride = x_BLHD.stride()
    adjacent = (head_stride, element_stride, token_stride % head_dim) == (head_dim, 1, 0)
    end_to_end = batch == 1 or sample_stride == tokens * token_stride
    return token_stride // head_dim if adjacent and end_to_end else 0
