"""Backward of one hop, from the final log-sum-exp and delta: one kernel for dQ, one for dK and dV.

FlashAttention 2 (Dao 2023, section 3.2), without its atomics: each sum has one program that adds to it, in a fixed
order, so results are the same bits every time; scores are computed twice for that. Gradients are added to what the
float32 buffers, which travel with their keys, hold already.
"""

import triton
import triton.language as tl

from megatron_ring.kernels.attention.triton.forward_kernel import LOG2_E
from megatron_ring.kernels.attention.triton.tiles import add, load, runs_of, visible, walk_of


@triton.jit
def backward_hop_queries(
    dout, q, k, v, log2_lse, delta, lo, hi, dq,
    queries, keys, heads, groups, heads_in_sums, scale,
    HEAD: tl.constexpr, PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program has one tile of queries of one head of one sample, as forward.

    log2_lse: (batch, heads, queries) float32: a power of two, and infinite where a query saw nothing.
    heads_in_sums: of a token of dq.
    """
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    head, sample = tl.program_id(1), tl.program_id(2)
    first, unmasked_from, unmasked_to, stop = walk_of(lo, hi, start, queries, BLOCK_Q, BLOCK_K)
    if first < stop:
        rows = start + tl.arange(0, BLOCK_Q)
        lo_Q, hi_Q = runs_of(lo, hi, rows, queries)
        q_QD = load(q, sample, queries, heads, head, start, BLOCK_Q, False, HEAD, PADDED, UPCAST)
        dout_QD = load(
            dout, sample, queries, heads, head, start, BLOCK_Q, False, HEAD, PADDED, UPCAST
        )
        lse_Q, delta_Q = _of_rows(log2_lse, delta, sample, heads, head, queries, rows)
        group = head // (heads // groups)
        dq_QD = tl.zeros((BLOCK_Q, PADDED), tl.float32)
        dq_QD = _walk_keys(
            dq_QD, q_QD, dout_QD, lse_Q, delta_Q, k, v, lo_Q, hi_Q, sample, keys, groups, group, first, unmasked_from,
            scale, True, HEAD, PADDED, BLOCK_K, UPCAST,
        )  # fmt: skip
        dq_QD = _walk_keys(
            dq_QD, q_QD, dout_QD, lse_Q, delta_Q, k, v, lo_Q, hi_Q, sample, keys, groups, group, unmasked_from,
            unmasked_to, scale, False, HEAD, PADDED, BLOCK_K, UPCAST,
        )  # fmt: skip
        dq_QD = _walk_keys(
            dq_QD, q_QD, dout_QD, lse_Q, delta_Q, k, v, lo_Q, hi_Q, sample, keys, groups, group, unmasked_to, stop,
            scale, True, HEAD, PADDED, BLOCK_K, UPCAST,
        )  # fmt: skip
        add(dq, sample, queries, heads_in_sums, head, start, dq_QD * scale, BLOCK_Q, HEAD, PADDED)


@triton.jit
def _walk_keys(
    dq_QD, q_QD, dout_QD, lse_Q, delta_Q, k, v, lo_Q, hi_Q, sample, keys, groups, group, start, stop, scale,
    MASKED: tl.constexpr, HEAD: tl.constexpr, PADDED: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for block in range(start, stop, BLOCK_K):
        columns = block + tl.arange(0, BLOCK_K)
        k_KD = load(
            k, sample, keys, groups, group, block, BLOCK_K, not MASKED, HEAD, PADDED, UPCAST
        )
        v_KD = load(
            v, sample, keys, groups, group, block, BLOCK_K, not MASKED, HEAD, PADDED, UPCAST
        )
        score_QK = tl.dot(q_QD, tl.trans(k_KD), input_precision="ieee")
        p_QK = tl.exp2(tl.fma(score_QK, scale * LOG2_E, -lse_Q[:, None]))
        if MASKED:
            p_QK = tl.where(visible(lo_Q[:, None], hi_Q[:, None], columns[None, :]), p_QK, 0.0)
        dp_QK = tl.dot(dout_QD, tl.trans(v_KD), input_precision="ieee")
        ds_QK = p_QK * (dp_QK - delta_Q[:, None])
        dq_QD = tl.dot(ds_QK.to(k_KD.dtype), k_KD, dq_QD, input_precision="ieee")
    return dq_QD


@triton.jit
def backward_hop_keys(
    dout, q, k, v, log2_lse, delta, seen_from, seen_to, dk, dv,
    queries, keys, heads, groups, heads_in_sums, scale,
    HEAD: tl.constexpr, PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program has one tile of keys of one key-value head of one sample, and walks the query heads that read it.

    seen_from, seen_to: (keys,) int32. The queries [from, to) see a key: lo and hi, transposed.
    heads_in_sums: of a token of dk and dv.
    """
    start = tl.program_id(0) * BLOCK_K
    group, sample = tl.program_id(1), tl.program_id(2)
    first, unmasked_from, unmasked_to, stop = walk_of(
        seen_from, seen_to, start, keys, BLOCK_K, BLOCK_Q
    )
    if first < stop:
        from_K, to_K = runs_of(seen_from, seen_to, start + tl.arange(0, BLOCK_K), keys)
        k_KD = load(k, sample, keys, groups, group, start, BLOCK_K, False, HEAD, PADDED, UPCAST)
        v_KD = load(v, sample, keys, groups, group, start, BLOCK_K, False, HEAD, PADDED, UPCAST)
        dk_KD = tl.zeros((BLOCK_K, PADDED), tl.float32)
        dv_KD = tl.zeros((BLOCK_K, PADDED), tl.float32)
        query_ranges = heads // groups
        for head in range(group * query_ranges, (group + 1) * query_ranges):
            dk_KD, dv_KD = _walk_queries(
                dk_KD, dv_KD, k_KD, v_KD, dout, q, log2_lse, delta, from_K, to_K, sample, queries, heads, head, first,
                unmasked_from, scale, True, HEAD, PADDED, BLOCK_Q, UPCAST,
            )  # fmt: skip
            dk_KD, dv_KD = _walk_queries(
                dk_KD, dv_KD, k_KD, v_KD, dout, q, log2_lse, delta, from_K, to_K, sample, queries, heads, head,
                unmasked_from, unmasked_to, scale, False, HEAD, PADDED, BLOCK_Q, UPCAST,
            )  # fmt: skip
            dk_KD, dv_KD = _walk_queries(
                dk_KD, dv_KD, k_KD, v_KD, dout, q, log2_lse, delta, from_K, to_K, sample, queries, heads, head,
                unmasked_to, stop, scale, True, HEAD, PADDED, BLOCK_Q, UPCAST,
            )  # fmt: skip
        add(dk, sample, keys, heads_in_sums, group, start, dk_KD * scale, BLOCK_K, HEAD, PADDED)
        add(dv, sample, keys, heads_in_sums, group, start, dv_KD, BLOCK_K, HEAD, PADDED)


@triton.jit
def _walk_queries(
    dk_KD, dv_KD, k_KD, v_KD, dout, q, log2_lse, delta, from_K, to_K, sample, queries, heads, head, start, stop, scale,
    MASKED: tl.constexpr, HEAD: tl.constexpr, PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for block in range(start, stop, BLOCK_Q):
        rows = block + tl.arange(0, BLOCK_Q)
        q_QD = load(
            q, sample, queries, heads, head, block, BLOCK_Q, not MASKED, HEAD, PADDED, UPCAST
        )
        dout_QD = load(
            dout, sample, queries, heads, head, block, BLOCK_Q, not MASKED, HEAD, PADDED, UPCAST
        )
        lse_Q, delta_Q = _of_rows(log2_lse, delta, sample, heads, head, queries, rows)
        score_KQ = tl.dot(k_KD, tl.trans(q_QD), input_precision="ieee")
        p_KQ = tl.exp2(tl.fma(score_KQ, scale * LOG2_E, -lse_Q[None, :]))
        if MASKED:
            p_KQ = tl.where(visible(from_K[:, None], to_K[:, None], rows[None, :]), p_KQ, 0.0)
        dv_KD = tl.dot(p_KQ.to(dout_QD.dtype), dout_QD, dv_KD, input_precision="ieee")
        dp_KQ = tl.dot(v_KD, tl.trans(dout_QD), input_precision="ieee")
        ds_KQ = p_KQ * (dp_KQ - delta_Q[None, :])
        dk_KD = tl.dot(ds_KQ.to(q_QD.dtype), q_QD, dk_KD, input_precision="ieee")
    return dk_KD, dv_KD


@triton.jit
def _of_rows(log2_lse, delta, sample, heads, head, queries, rows):
    """The log-sum-exp and delta of these queries. A row that is no query weighs nothing: its sum is infinite."""
    at = (sample.to(tl.int64) * heads + head) * queries + rows
    there = rows < queries
    return tl.load(log2_lse + at, mask=there, other=float("inf")), tl.load(
        delta + at, mask=there, other=0.0
    )
