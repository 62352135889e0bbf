"""A pack by flash-attn 3 (Shah et al. 2024, FlashAttention-3), for Hopper GPUs.

By its operators, ``torch.ops.flash_attn_3.fwd`` and ``bwd``, which return and take the log-sum-exp: the functions in
Python above them changed their parameters within 3.0.0b1, the operators kept theirs (as read at commit 01d6dd1 of
Dao-AILab/flash-attention). Never run on a GPU; the tests have a stand-in with this schema. Imported when first called.
"""

import torch


def forward(
    q_THD, k_UGD, v_UGD, bounds: torch.Tensor, longest: tuple[int, int], causal: bool, scale: float
):
    """out_THD, and lse_HT in float32, -inf or +inf where a query sees nothing."""
    out, lse, *_ = _operators().fwd(
        q_THD, k_UGD, v_UGD, cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1],
        max_seqlen_q=longest[0], max_seqlen_k=longest[1], softmax_scale=scale, is_causal=causal, num_splits=1,
    )  # fmt: skip
    return out, lse


def backward(
    dout_THD, q_THD, k_UGD, v_UGD, out_THD, lse_HT, bounds: torch.Tensor, longest: tuple[int, int],
    causal: bool, scale: float, deterministic: bool,
):  # fmt: skip
    """dq_THD, dk_UGD, dv_UGD from the final, merged ``out`` and ``lse``, which is contiguous."""
    gradients = [torch.empty_like(x) for x in (q_THD, k_UGD, v_UGD)]
    _operators().bwd(
        dout_THD, q_THD, k_UGD, v_UGD, out_THD, lse_HT, *gradients, cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1],
        max_seqlen_q=longest[0], max_seqlen_k=longest[1], softmax_scale=scale, is_causal=causal,
        deterministic=deterministic,
    )  # fmt: skip
    return gradients


def _operators():
    import flash_attn_3._C  # noqa: F401  it registers them

    return torch.ops.flash_attn_3
