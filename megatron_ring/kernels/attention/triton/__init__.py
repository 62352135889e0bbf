"""One hop in Triton, for key ranges as they are: any layout, with documents or windows.

Blocks in which nothing is visible are skipped; blocks that all their queries see completely are
computed without a mask. State and gradients are float32, read and written in place. The block sizes
are a small table (blocks.py), not a search.
"""

import torch
import triton

from megatron_ring.kernels.attention.hop_kernel import GradientAccumulators, HopInputs
from megatron_ring.kernels.attention.running_softmax import Output, RunningSoftmax, delta_of
from megatron_ring.kernels.attention.triton.backward_kernels import (
    backward_hop_keys,
    backward_hop_queries,
)
from megatron_ring.kernels.attention.triton.blocks import blocks_for, generation_of
from megatron_ring.kernels.attention.triton.forward_kernel import LOG2_E, forward_hop


def forward(inputs: HopInputs, state: RunningSoftmax) -> None:
    """As in ``HopKernel``."""
    *qkv, key_ranges, scale = inputs
    q, k, v = (x.contiguous() for x in qkv)
    in_place = state.out_BLHD.is_contiguous() and state.lse_BHL.is_contiguous()
    assert in_place, "the state is updated in place and must be contiguous"
    batch, queries, heads, head_dim = q.shape
    sizes = blocks_for("forward", head_dim, generation_of(q.device))
    forward_hop[triton.cdiv(queries, sizes.block_q), heads, batch](
        q, k, v, state.out_BLHD, state.lse_BHL, *key_ranges.bounds(q.device),
        queries, k.shape[1], heads, k.shape[2], scale * LOG2_E.value, **sizes.settings(head_dim),
    )  # fmt: skip


def backward(
    inputs: HopInputs,
    dout_BLHD: torch.Tensor,
    out: Output,
    lse_BHL: torch.Tensor,
    accumulators: GradientAccumulators,
) -> None:
    """As in ``HopKernel``."""
    *qkv, key_ranges, scale = inputs
    dq_BLHD, dk_BLGD, dv_BLGD = accumulators
    dout, q, k, v = (x.contiguous() for x in (dout_BLHD, *qkv))
    tensors = dout, q, k, v, _log2(lse_BHL), delta_of(out, dout).contiguous()
    batch, queries, heads, head_dim = q.shape
    keys, groups = k.shape[1:3]
    shape = (queries, keys, heads, groups)
    generation = generation_of(q.device)
    sizes = blocks_for("queries", head_dim, generation)
    backward_hop_queries[triton.cdiv(queries, sizes.block_q), heads, batch](
        *tensors, *key_ranges.bounds(q.device), dq_BLHD,
        *shape, _token_stride_in_heads(dq_BLHD), scale, **sizes.settings(head_dim),
    )  # fmt: skip
    sizes = blocks_for("keys", head_dim, generation)
    backward_hop_keys[triton.cdiv(keys, sizes.block_k), groups, batch](
        *tensors, *key_ranges.query_ranges(keys, q.device), dk_BLGD, dv_BLGD,
        *shape, _token_stride_in_heads(dk_BLGD, dv_BLGD), scale, **sizes.settings(head_dim),
    )  # fmt: skip


def _log2(lse_BHL: torch.Tensor) -> torch.Tensor:
    """Convert to base 2; +inf for queries that saw nothing, which gives them no weight."""
    return torch.where(lse_BHL.isneginf(), torch.inf, lse_BHL * LOG2_E.value).contiguous()


def _token_stride_in_heads(*sums_BLHD: torch.Tensor) -> int:
    """Return the distance of two tokens in memory, in heads; sums may be slices of heads."""
    batch, tokens, _, head_dim = sums_BLHD[0].shape
    sample_stride, token_stride, head_stride, element_stride = sums_BLHD[0].stride()
    adjacent = (head_stride, element_stride, token_stride % head_dim) == (head_dim, 1, 0)
    assert adjacent, "the heads of a token must be adjacent in memory"
    end_to_end = batch == 1 or sample_stride == tokens * token_stride
    assert end_to_end, "samples must follow each other without a gap"
    same = all(x.stride() == sums_BLHD[0].stride() for x in sums_BLHD)
    assert same, "all sums must have the same strides"
    return token_stride // head_dim
