"""One hop in plain torch over the whole matrix of scores; in float64 the oracle of other kernels.

It materialises queries x keys, so it is for tests and small sizes. Softmax attention (Vaswani et
al. 2017, section 3.2.1) and its gradient from the merged output and log-sum-exp (Dao et al. 2022,
FlashAttention, appendix B.2).
"""

import torch

from megatron_ring.kernels.attention.hop_kernel import GradientAccumulators, HopInputs
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.running_softmax import Output, RunningSoftmax, delta_of
from megatron_ring.kernels.attention.tiles import Tile, TileKind


def forward(inputs: HopInputs, state: RunningSoftmax) -> None:
    """As in ``HopKernel``."""
    q_BLHD, k_BLGD, v_BLGD, key_ranges, scale = inputs
    if key_ranges.visible_pairs == 0:
        return
    scores_BHLM = _scores(q_BLHD, k_BLGD, key_ranges, scale)
    v_BMHD = _repeat_heads(v_BLGD, q_BLHD)
    lse_BHL = scores_BHLM.logsumexp(-1)
    probability_BHLM = torch.exp(scores_BHLM - lse_BHL.unsqueeze(-1)).nan_to_num(0.0)
    out_BLHD = torch.einsum("bhlm,bmhd->blhd", probability_BHLM, v_BMHD)
    state.merge(slice(0, q_BLHD.shape[1]), out_BLHD, lse_BHL)


def backward(
    inputs: HopInputs,
    dout_BLHD: torch.Tensor,
    out: Output,
    lse_BHL: torch.Tensor,
    accumulators: GradientAccumulators,
) -> None:
    """As in ``HopKernel``."""
    q_BLHD, k_BLGD, v_BLGD, key_ranges, scale = inputs
    if key_ranges.visible_pairs == 0:
        return
    dq_BLHD, dk_BLGD, dv_BLGD = accumulators
    k_BMHD, v_BMHD = _repeat_heads(k_BLGD, q_BLHD), _repeat_heads(v_BLGD, q_BLHD)
    q_BLHD, dout_BLHD = q_BLHD.to(dq_BLHD.dtype), dout_BLHD.to(dq_BLHD.dtype)
    delta_BHL1 = delta_of(out, dout_BLHD).unsqueeze(-1)
    p_BHLM = torch.exp(_scores(q_BLHD, k_BLGD, key_ranges, scale) - lse_BHL.unsqueeze(-1))
    dp_BHLM = torch.einsum("blhd,bmhd->bhlm", dout_BLHD, v_BMHD)
    ds_BHLM = p_BHLM * (dp_BHLM - delta_BHL1) * scale
    dq_BLHD += torch.einsum("bhlm,bmhd->blhd", ds_BHLM, k_BMHD)
    dk_BLGD += _sum_over_group(torch.einsum("bhlm,blhd->bmhd", ds_BHLM, q_BLHD), k_BLGD)
    dv_BLGD += _sum_over_group(torch.einsum("bhlm,blhd->bmhd", p_BHLM, dout_BLHD), v_BLGD)


def _scores(
    q_BLHD: torch.Tensor, k_BLGD: torch.Tensor, key_ranges: KeyRanges, scale: float
) -> torch.Tensor:
    """Compute the scaled scores, -inf where a key is not visible."""
    k_BMHD = _repeat_heads(k_BLGD, q_BLHD)
    whole_hop = Tile(slice(0, q_BLHD.shape[1]), slice(0, k_BLGD.shape[1]), TileKind.MASKED)
    visible_LM = key_ranges.visible(whole_hop, q_BLHD.device)
    scores_BHLM = torch.einsum("blhd,bmhd->bhlm", q_BLHD.to(k_BMHD.dtype), k_BMHD) * scale
    return scores_BHLM.masked_fill(~visible_LM, -torch.inf)


def _repeat_heads(kv_BMGD: torch.Tensor, q_BLHD: torch.Tensor) -> torch.Tensor:
    """Repeat key-value heads for the query heads of their group, in the accumulation dtype."""
    dtype = torch.promote_types(kv_BMGD.dtype, torch.float32)
    return kv_BMGD.to(dtype).repeat_interleave(q_BLHD.shape[2] // kv_BMGD.shape[2], dim=2)


def _sum_over_group(grad_BMHD: torch.Tensor, kv_BMGD: torch.Tensor) -> torch.Tensor:
    return grad_BMHD.unflatten(2, (kv_BMGD.shape[2], -1)).sum(3)
