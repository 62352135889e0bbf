"""Forward of one hop: the running softmax is read, continued over the keys at hand, and written where it was.

FlashAttention 2 (Dao 2023, section 3.1), with the state of Ring Attention's blockwise softmax (Liu et al. 2023,
section 3) carried from hop to hop in float32, so that nothing is rounded or merged between hops.
"""

import triton
import triton.language as tl

from megatron_ring.kernels.attention.triton.tiles import (
    inside,
    load,
    pointers,
    runs_of,
    visible,
    walk_of,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def forward_hop(
    q, k, v, out, lse, lo, hi,
    queries, keys, heads, groups, log2_scale,
    HEAD: tl.constexpr, PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program has one tile of queries of one head of one sample. Long runs come first: later queries see more."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    head, sample = tl.program_id(1), tl.program_id(2)
    first, unmasked_from, unmasked_to, stop = walk_of(lo, hi, start, queries, BLOCK_Q, BLOCK_K)
    if first < stop:
        rows = start + tl.arange(0, BLOCK_Q)
        there = rows < queries
        lo_Q, hi_Q = runs_of(lo, hi, rows, queries)
        q_QD = load(q, sample, queries, heads, head, start, BLOCK_Q, False, HEAD, PADDED, UPCAST)
        out_at = pointers(out, sample, queries, heads, head, start, BLOCK_Q, HEAD, PADDED)
        lse_at = lse + (sample.to(tl.int64) * heads + head) * queries + rows
        lse_Q = tl.load(lse_at, mask=there, other=float("-inf"))
        # A normalised output is a sum whose weights, relative to their log-sum-exp, add up to 1.
        acc_QD = tl.load(out_at, mask=inside(queries, start, BLOCK_Q, HEAD, PADDED), other=0.0)
        sum_Q = tl.where(lse_Q == float("-inf"), 0.0, 1.0)
        max_Q = lse_Q * LOG2_E

        group = head // (heads // groups)
        acc_QD, sum_Q, max_Q = _attend(
            acc_QD, sum_Q, max_Q, q_QD, k, v, lo_Q, hi_Q, sample, keys, groups, group, first, unmasked_from,
            log2_scale, True, HEAD, PADDED, BLOCK_K, UPCAST,
        )  # fmt: skip
        acc_QD, sum_Q, max_Q = _attend(
            acc_QD, sum_Q, max_Q, q_QD, k, v, lo_Q, hi_Q, sample, keys, groups, group, unmasked_from, unmasked_to,
            log2_scale, False, HEAD, PADDED, BLOCK_K, UPCAST,
        )  # fmt: skip
        acc_QD, sum_Q, max_Q = _attend(
            acc_QD, sum_Q, max_Q, q_QD, k, v, lo_Q, hi_Q, sample, keys, groups, group, unmasked_to, stop,
            log2_scale, True, HEAD, PADDED, BLOCK_K, UPCAST,
        )  # fmt: skip

        seen = sum_Q > 0
        sum_Q = tl.where(seen, sum_Q, 1.0)
        tl.store(
            out_at, acc_QD / sum_Q[:, None], mask=inside(queries, start, BLOCK_Q, HEAD, PADDED)
        )
        tl.store(
            lse_at, tl.where(seen, (max_Q + tl.log2(sum_Q)) / LOG2_E, float("-inf")), mask=there
        )


@triton.jit
def _attend(
    acc_QD, sum_Q, max_Q, q_QD, k, v, lo_Q, hi_Q, sample, keys, groups, group, start, stop, log2_scale,
    MASKED: tl.constexpr, HEAD: tl.constexpr, PADDED: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Take in the keys of [start, stop), in whole blocks; ``MASKED``: of each query's run alone.

    Scores are scaled, by a positive number, where the maximum is subtracted: one instruction for an element, not two.
    """
    for block in range(start, stop, BLOCK_K):
        columns = block + tl.arange(0, BLOCK_K)
        k_KD = load(
            k, sample, keys, groups, group, block, BLOCK_K, not MASKED, HEAD, PADDED, UPCAST
        )
        v_KD = load(
            v, sample, keys, groups, group, block, BLOCK_K, not MASKED, HEAD, PADDED, UPCAST
        )
        score_QK = tl.dot(q_QD, tl.trans(k_KD), input_precision="ieee")
        if MASKED:
            score_QK = tl.where(
                visible(lo_Q[:, None], hi_Q[:, None], columns[None, :]), score_QK, float("-inf")
            )
        new_max_Q = tl.maximum(max_Q, tl.max(score_QK, 1) * log2_scale)
        # A row that has seen nothing has no maximum to be relative to.
        base_Q = tl.where(new_max_Q == float("-inf"), 0.0, new_max_Q)
        p_QK = tl.exp2(tl.fma(score_QK, log2_scale, -base_Q[:, None]))
        shrunk_Q = tl.exp2(max_Q - base_Q)
        sum_Q = sum_Q * shrunk_Q + tl.sum(p_QK, 1)
        acc_QD = tl.dot(
            p_QK.to(v_KD.dtype), v_KD, acc_QD * shrunk_Q[:, None], input_precision="ieee"
        )
        max_Q = new_max_Q
    return acc_QD, sum_Q, max_Q
