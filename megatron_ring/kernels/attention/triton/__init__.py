"""One hop in Triton: the mask language as it is, a run of keys per query, whatever the layout, documents or windows.

Tiles that nobody sees are skipped, tiles that all their queries see wholly go without a mask. State and gradients are
float32, read and written in place. The block sizes are a small table (blocks.py), not a search.
"""

import torch
import triton

from megatron_ring.kernels.attention.runs import KeyRanges
from megatron_ring.kernels.attention.state import Output, RunningSoftmax, delta_of
from megatron_ring.kernels.attention.triton.backward_kernels import (
    backward_hop_keys,
    backward_hop_queries,
)
from megatron_ring.kernels.attention.triton.blocks import blocks_for, generation_of
from megatron_ring.kernels.attention.triton.forward_kernel import LOG2_E, forward_hop


def forward(
    q_BLHD: torch.Tensor,
    k_BLGD: torch.Tensor,
    v_BLGD: torch.Tensor,
    runs: KeyRanges,
    scale: float,
    state: RunningSoftmax,
) -> None:
    """Let the queries see their runs of this block of keys; ``state`` is updated in place."""
    q, k, v = (x.contiguous() for x in (q_BLHD, k_BLGD, v_BLGD))
    assert all(x.is_contiguous() for x in (state.out_BLHD, state.lse_BHL)), (
        "a state that can be continued in place"
    )
    batch, queries, heads, head = q.shape
    sizes = blocks_for("forward", head, generation_of(q.device))
    forward_hop[triton.cdiv(queries, sizes.block_q), heads, batch](
        q, k, v, state.out_BLHD, state.lse_BHL, *runs.bounds(q.device),
        queries, k.shape[1], heads, k.shape[2], scale * LOG2_E.value, **sizes.settings(head),
    )  # fmt: skip


def backward(
    dout_BLHD: torch.Tensor,
    q_BLHD: torch.Tensor,
    k_BLGD: torch.Tensor,
    v_BLGD: torch.Tensor,
    out: Output,
    lse_BHL: torch.Tensor,
    runs: KeyRanges,
    scale: float,
    dq_BLHD: torch.Tensor,
    dk_BLGD: torch.Tensor,
    dv_BLGD: torch.Tensor,
) -> None:
    """Add this block's share to ``dq``, ``dk``, ``dv``. ``out`` and ``lse`` are the final, merged ones."""
    dout, q, k, v = (x.contiguous() for x in (dout_BLHD, q_BLHD, k_BLGD, v_BLGD))
    inputs = dout, q, k, v, _log2(lse_BHL), delta_of(out, dout).contiguous()
    batch, queries, heads, head = q.shape
    keys, groups = k.shape[1:3]
    shape, generation = (queries, keys, heads, groups), generation_of(q.device)
    sizes = blocks_for("queries", head, generation)
    backward_hop_queries[triton.cdiv(queries, sizes.block_q), heads, batch](
        *inputs, *runs.bounds(q.device), dq_BLHD,
        *shape, _heads_of_a_token(dq_BLHD), scale, **sizes.settings(head),
    )  # fmt: skip
    sizes = blocks_for("keys", head, generation)
    backward_hop_keys[triton.cdiv(keys, sizes.block_k), groups, batch](
        *inputs, *runs.query_ranges(keys, q.device), dk_BLGD, dv_BLGD,
        *shape, _heads_of_a_token(dk_BLGD, dv_BLGD), scale, **sizes.settings(head),
    )  # fmt: skip


def _log2(lse_BHL: torch.Tensor) -> torch.Tensor:
    """As a power of two. Queries that saw nothing get an infinite sum, beside which no key weighs anything."""
    return torch.where(lse_BHL.isneginf(), torch.inf, lse_BHL * LOG2_E.value).contiguous()


def _heads_of_a_token(*sums_BLHD: torch.Tensor) -> int:
    """How many heads lie between two tokens in memory: sums may be some heads of contiguous ones."""
    (batch, tokens, _, head), (of_sample, of_token, of_head, of_element) = (
        sums_BLHD[0].shape,
        sums_BLHD[0].stride(),
    )
    assert (of_head, of_element, of_token % head) == (head, 1, 0), (
        "sums whose heads lie side by side"
    )
    assert batch == 1 or of_sample == tokens * of_token, "sums whose samples lie end to end"
    assert all(x.stride() == sums_BLHD[0].stride() for x in sums_BLHD), "sums that lie alike"
    return of_token // head
