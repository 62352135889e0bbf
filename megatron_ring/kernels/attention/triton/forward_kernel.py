"""Forward of one hop: read the running softmax, continue it over the hop's keys, write it back.

FlashAttention 2 (Dao 2023, section 3.1), with the state of Ring Attention's blockwise softmax (Liu
et al. 2023, section 3) carried from hop to hop in float32, so nothing is rounded or merged between
hops.

Suffixes: Q queries of a tile, K keys of a block, D the padded head dim.
"""

import triton
import triton.language as tl

from megatron_ring.kernels.attention.triton.tile_access import (
    inside,
    load,
    load_ranges,
    load_tile,
    pointers,
    visible,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def forward_hop(
    q, k, v, out, lse, lo, hi, tiles,
    queries, keys, heads, groups, heads_in_q, groups_in_kv, log2_scale,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One program computes one tile of queries of one head of one sample.

    tiles: (tiles, 5) int32, a TileList of queries; the programs with the most work start first.
    heads_in_q, groups_in_kv: the distance of two tokens in memory, in heads.
    """
    head, sample = tl.program_id(0), tl.program_id(2)
    start, first, unmasked_from, unmasked_to, stop = load_tile(
        tiles, tl.program_id(1), BLOCK_Q, BLOCK_K
    )
    rows = start + tl.arange(0, BLOCK_Q)
    exists = rows < queries
    exists_QD = inside(queries, start, BLOCK_Q, HEAD_DIM, PADDED)
    lo_Q, hi_Q = load_ranges(lo, hi, rows, queries)
    q_QD = load(
        q, sample, queries, heads_in_q, head, start, BLOCK_Q, False, HEAD_DIM, PADDED, UPCAST
    )
    out_at = pointers(out, sample, queries, heads, head, start, BLOCK_Q, HEAD_DIM, PADDED)
    lse_at = lse + (sample.to(tl.int64) * heads + head) * queries + rows
    lse_Q = tl.load(lse_at, mask=exists, other=float("-inf"))
    # A normalised output is a sum whose weights, relative to their log-sum-exp, add up to 1.
    acc_QD = tl.load(out_at, mask=exists_QD, other=0.0)
    sum_Q = tl.where(lse_Q == float("-inf"), 0.0, 1.0)
    max_Q = lse_Q * LOG2_E

    group = head // (heads // groups)
    acc_QD, sum_Q, max_Q = _attend(
        acc_QD, sum_Q, max_Q, q_QD, k, v, lo_Q, hi_Q, sample, keys, groups_in_kv, group,
        first, unmasked_from, log2_scale, True, HEAD_DIM, PADDED, BLOCK_K, UPCAST,
    )  # fmt: skip
    acc_QD, sum_Q, max_Q = _attend(
        acc_QD, sum_Q, max_Q, q_QD, k, v, lo_Q, hi_Q, sample, keys, groups_in_kv, group,
        unmasked_from, unmasked_to, log2_scale, False, HEAD_DIM, PADDED, BLOCK_K, UPCAST,
    )  # fmt: skip
    acc_QD, sum_Q, max_Q = _attend(
        acc_QD, sum_Q, max_Q, q_QD, k, v, lo_Q, hi_Q, sample, keys, groups_in_kv, group,
        unmasked_to, stop, log2_scale, True, HEAD_DIM, PADDED, BLOCK_K, UPCAST,
    )  # fmt: skip

    seen = sum_Q > 0
    sum_Q = tl.where(seen, sum_Q, 1.0)
    new_lse_Q = tl.where(seen, (max_Q + tl.log2(sum_Q)) / LOG2_E, float("-inf"))
    tl.store(out_at, acc_QD / sum_Q[:, None], mask=exists_QD)
    tl.store(lse_at, new_lse_Q, mask=exists)


@triton.jit
def _attend(
    acc_QD, sum_Q, max_Q, q_QD, k, v, lo_Q, hi_Q, sample, keys, groups_in_kv, group,
    start, stop, log2_scale,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Continue the softmax over the keys [start, stop), in whole blocks.

    MASKED: apply each query's key range. Scores are scaled, by a positive number, together with the
    subtraction of the maximum: one instruction per element instead of two.
    """
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
        if MASKED:
            score_QK = tl.where(
                visible(lo_Q[:, None], hi_Q[:, None], columns[None, :]), score_QK, float("-inf")
            )
        new_max_Q = tl.maximum(max_Q, tl.max(score_QK, 1) * log2_scale)
        # A row that has seen nothing has no maximum to subtract.
        base_Q = tl.where(new_max_Q == float("-inf"), 0.0, new_max_Q)
        p_QK = tl.exp2(tl.fma(score_QK, log2_scale, -base_Q[:, None]))
        decay_Q = tl.exp2(max_Q - base_Q)
        sum_Q = sum_Q * decay_Q + tl.sum(p_QK, 1)
        acc_QD = tl.dot(
            p_QK.to(v_KD.dtype), v_KD, acc_QD * decay_Q[:, None], input_precision="ieee"
        )
        max_Q = new_max_Q
    return acc_QD, sum_Q, max_Q
