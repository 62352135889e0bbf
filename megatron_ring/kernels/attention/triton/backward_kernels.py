"""Backward of one hop, from the final log-sum-exp and delta.

FlashAttention 2 (Dao 2023, section 3.2) in two forms. The kernel over keys computes dK and dV of a
tile and, with ADDS_DQ, adds dQ atomically: five products per visible pair. Without atomics, for
bitwise deterministic results, exactly one program adds to each sum, in a fixed order: dQ has a
kernel of its own, which computes the scores again, seven products in all. Gradients are added to
float32 buffers, which for dK and dV travel with their keys.

Suffixes: Q queries, K keys of a tile or block, D the padded head dim.
"""

import triton
import triton.language as tl

from megatron_ring.kernels.attention.triton.forward_kernel import LOG2_E
from megatron_ring.kernels.attention.triton.tile_access import (
    add,
    add_atomically,
    load,
    load_ranges,
    load_tile,
    visible,
)


@triton.jit
def backward_hop_queries(
    dout, q, k, v, log2_lse, delta, lo, hi, tiles, dq,
    queries, keys, heads, groups, heads_in_q, groups_in_kv, heads_in_dq, scale,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One program computes dQ of one tile of queries of one head of one sample, in forward's order.

    log2_lse: (batch, heads, queries) float32, in base 2, and +inf where a query saw nothing.
    tiles: (tiles, 5) int32, a TileList of queries.
    heads_in_q (and dout) and so on: the distance of two tokens in memory, in heads.
    """
    head, sample = tl.program_id(0), tl.program_id(2)
    start, first, unmasked_from, unmasked_to, stop = load_tile(
        tiles, tl.program_id(1), BLOCK_Q, BLOCK_K
    )
    rows = start + tl.arange(0, BLOCK_Q)
    lo_Q, hi_Q = load_ranges(lo, hi, rows, queries)
    q_QD = load(
        q, sample, queries, heads_in_q, head, start, BLOCK_Q, False, HEAD_DIM, PADDED, UPCAST
    )
    dout_QD = load(
        dout, sample, queries, heads_in_q, head, start, BLOCK_Q, False, HEAD_DIM, PADDED, UPCAST
    )
    lse_Q, delta_Q = _load_lse_and_delta(log2_lse, delta, sample, heads, head, queries, rows)
    group = head // (heads // groups)
    dq_QD = tl.zeros((BLOCK_Q, PADDED), tl.float32)
    dq_QD = _loop_over_keys(
        dq_QD, q_QD, dout_QD, lse_Q, delta_Q, k, v, lo_Q, hi_Q, sample, keys, groups_in_kv, group,
        first, unmasked_from, scale, True, HEAD_DIM, PADDED, BLOCK_K, UPCAST,
    )  # fmt: skip
    dq_QD = _loop_over_keys(
        dq_QD, q_QD, dout_QD, lse_Q, delta_Q, k, v, lo_Q, hi_Q, sample, keys, groups_in_kv, group,
        unmasked_from, unmasked_to, scale, False, HEAD_DIM, PADDED, BLOCK_K, UPCAST,
    )  # fmt: skip
    dq_QD = _loop_over_keys(
        dq_QD, q_QD, dout_QD, lse_Q, delta_Q, k, v, lo_Q, hi_Q, sample, keys, groups_in_kv, group,
        unmasked_to, stop, scale, True, HEAD_DIM, PADDED, BLOCK_K, UPCAST,
    )  # fmt: skip
    dq_QD = dq_QD * scale
    add(dq, sample, queries, heads_in_dq, head, start, dq_QD, BLOCK_Q, HEAD_DIM, PADDED)


@triton.jit
def _loop_over_keys(
    dq_QD, q_QD, dout_QD, lse_Q, delta_Q, k, v, lo_Q, hi_Q, sample, keys, groups_in_kv, group,
    start, stop, scale,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Accumulate dQ, not yet scaled, over the keys [start, stop) in whole blocks."""
    for block in range(start, stop, BLOCK_K):
        columns = block + tl.arange(0, BLOCK_K)
        k_KD = load(
            k, sample, keys, groups_in_kv, group, block, BLOCK_K, not MASKED, HEAD_DIM, PADDED,
            UPCAST,
        )  # fmt: skip
        v_KD = load(
            v, sample, keys, groups_in_kv, group, block, BLOCK_K, not MASKED, HEAD_DIM, PADDED,
            UPCAST,
        )  # fmt: skip
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
    dout, q, k, v, log2_lse, delta, query_from, query_to, tiles, dq, dk, dv,
    queries, keys, heads, groups, heads_in_q, groups_in_kv, heads_in_dq,
    groups_in_dkv, scale,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr, ADDS_DQ: tl.constexpr,
):  # fmt: skip
    """One program computes dK and dV of one tile of keys of one key-value head of one sample.

    It loops over the query heads of its key-value head.
    query_from, query_to: (keys,) int32. A key is seen by the queries [from, to): lo and hi,
        transposed.
    tiles: (tiles, 5) int32, a TileList of keys.
    heads_in_q (and dout) and so on: the distance of two tokens in memory, in heads.
    ADDS_DQ: also add to dq, atomically; otherwise dq is not accessed.
    """
    group, sample = tl.program_id(0), tl.program_id(2)
    start, first, unmasked_from, unmasked_to, stop = load_tile(
        tiles, tl.program_id(1), BLOCK_K, BLOCK_Q
    )
    from_K, to_K = load_ranges(query_from, query_to, start + tl.arange(0, BLOCK_K), keys)
    k_KD = load(
        k, sample, keys, groups_in_kv, group, start, BLOCK_K, False, HEAD_DIM, PADDED, UPCAST
    )
    v_KD = load(
        v, sample, keys, groups_in_kv, group, start, BLOCK_K, False, HEAD_DIM, PADDED, UPCAST
    )
    dk_KD = tl.zeros((BLOCK_K, PADDED), tl.float32)
    dv_KD = tl.zeros((BLOCK_K, PADDED), tl.float32)
    heads_per_group = heads // groups
    first_head = group * heads_per_group
    if ADDS_DQ:
        # Two loops, unmasked and masked, each over all heads: each fills its pipeline once.
        dk_KD, dv_KD = _loop_over_queries(
            dk_KD, dv_KD, k_KD, v_KD, dout, q, log2_lse, delta, dq, from_K, to_K, sample, queries,
            heads, heads_in_q, heads_in_dq, first_head, heads_per_group,
            unmasked_from, unmasked_to, unmasked_to, unmasked_to, scale,
            False, HEAD_DIM, PADDED, BLOCK_Q, UPCAST, True,
        )  # fmt: skip
        dk_KD, dv_KD = _loop_over_queries(
            dk_KD, dv_KD, k_KD, v_KD, dout, q, log2_lse, delta, dq, from_K, to_K, sample, queries,
            heads, heads_in_q, heads_in_dq, first_head, heads_per_group,
            first, unmasked_from, unmasked_to, stop, scale,
            True, HEAD_DIM, PADDED, BLOCK_Q, UPCAST, True,
        )  # fmt: skip
    else:
        for head in range(first_head, first_head + heads_per_group):
            dk_KD, dv_KD = _loop_over_queries(
                dk_KD, dv_KD, k_KD, v_KD, dout, q, log2_lse, delta, dq, from_K, to_K, sample,
                queries, heads, heads_in_q, heads_in_dq, head, 1,
                first, unmasked_from, unmasked_from, unmasked_from, scale,
                True, HEAD_DIM, PADDED, BLOCK_Q, UPCAST, False,
            )  # fmt: skip
            dk_KD, dv_KD = _loop_over_queries(
                dk_KD, dv_KD, k_KD, v_KD, dout, q, log2_lse, delta, dq, from_K, to_K, sample,
                queries, heads, heads_in_q, heads_in_dq, head, 1,
                unmasked_from, unmasked_to, unmasked_to, unmasked_to, scale,
                False, HEAD_DIM, PADDED, BLOCK_Q, UPCAST, False,
            )  # fmt: skip
            dk_KD, dv_KD = _loop_over_queries(
                dk_KD, dv_KD, k_KD, v_KD, dout, q, log2_lse, delta, dq, from_K, to_K, sample,
                queries, heads, heads_in_q, heads_in_dq, head, 1,
                unmasked_to, stop, stop, stop, scale,
                True, HEAD_DIM, PADDED, BLOCK_Q, UPCAST, False,
            )  # fmt: skip
    dk_KD = dk_KD * scale
    add(dk, sample, keys, groups_in_dkv, group, start, dk_KD, BLOCK_K, HEAD_DIM, PADDED)
    add(dv, sample, keys, groups_in_dkv, group, start, dv_KD, BLOCK_K, HEAD_DIM, PADDED)


@triton.jit
def _loop_over_queries(
    dk_KD, dv_KD, k_KD, v_KD, dout, q, log2_lse, delta, dq, from_K, to_K, sample, queries,
    heads, heads_in_q, heads_in_dq, first_head, loop_heads,
    start, gap_from, gap_to, stop, scale,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_Q: tl.constexpr,
    UPCAST: tl.constexpr, ADDS_DQ: tl.constexpr,
):  # fmt: skip
    """Accumulate dK, not yet scaled, and dV over the queries of ``loop_heads`` heads.

    The queries are those of [start, stop) without [gap_from, gap_to). Without ADDS_DQ it is one
    head, and there is no gap.
    """
    gap = gap_to - gap_from
    blocks = (stop - start - gap + BLOCK_Q - 1) // BLOCK_Q
    divisor = tl.maximum(blocks, 1)
    # Without ADDS_DQ the loop is over queries itself: there are no registers for more.
    loop_start = 0 if ADDS_DQ else start
    loop_stop = loop_heads * blocks if ADDS_DQ else stop
    for i in range(loop_start, loop_stop, 1 if ADDS_DQ else BLOCK_Q):
        head = first_head
        block = i
        if ADDS_DQ:
            nth_head = i // divisor
            head += nth_head
            block = start + (i - nth_head * divisor) * BLOCK_Q
            if MASKED:
                block += tl.where(block >= gap_from, gap, 0)
        rows = block + tl.arange(0, BLOCK_Q)
        q_QD = load(
            q, sample, queries, heads_in_q, head, block, BLOCK_Q, not MASKED, HEAD_DIM, PADDED,
            UPCAST,
        )  # fmt: skip
        dout_QD = load(
            dout, sample, queries, heads_in_q, head, block, BLOCK_Q, not MASKED, HEAD_DIM,
            PADDED, UPCAST,
        )  # fmt: skip
        lse_Q, delta_Q = _load_lse_and_delta(log2_lse, delta, sample, heads, head, queries, rows)
        score_KQ = tl.dot(k_KD, tl.trans(q_QD), input_precision="ieee")
        p_KQ = tl.exp2(tl.fma(score_KQ, scale * LOG2_E, -lse_Q[None, :]))
        if MASKED:
            p_KQ = tl.where(visible(from_K[:, None], to_K[:, None], rows[None, :]), p_KQ, 0.0)
        dv_KD = tl.dot(p_KQ.to(dout_QD.dtype), dout_QD, dv_KD, input_precision="ieee")
        dp_KQ = tl.dot(v_KD, tl.trans(dout_QD), input_precision="ieee")
        ds_KQ = (p_KQ * (dp_KQ - delta_Q[None, :])).to(q_QD.dtype)
        dk_KD = tl.dot(ds_KQ, q_QD, dk_KD, input_precision="ieee")
        if ADDS_DQ:
            dq_QD = tl.trans(tl.dot(tl.trans(k_KD), ds_KQ, input_precision="ieee")) * scale
            add_atomically(
                dq, sample, queries, heads_in_dq, head, block, dq_QD, BLOCK_Q, not MASKED,
                HEAD_DIM, PADDED,
            )  # fmt: skip
    return dk_KD, dv_KD


@triton.jit
def _load_lse_and_delta(log2_lse, delta, sample, heads, head, queries, rows):
    """Load the log-sum-exp and delta of queries; +inf and 0, hence no weight, after the last."""
    at = (sample.to(tl.int64) * heads + head) * queries + rows
    exists = rows < queries
    lse_Q = tl.load(log2_lse + at, mask=exists, other=float("inf"))
    delta_Q = tl.load(delta + at, mask=exists, other=0.0)
    return lse_Q, delta_Q
