"""A pack by flash-attn 2 (Dao 2023, FlashAttention-2), from version 2.7 on; on Ampere and later GPUs.

By the functions under its autograd ones, which return and take the log-sum-exp: the gradient of a hop needs the merged
out and lse. Their parameters are the same in 2.7.0 and 2.8.3. Never run on a GPU; the tests have a stand-in with
these parameters. The library is imported when first called, for it loads CUDA.
"""

import torch


def forward(
    q_THD, k_UGD, v_UGD, bounds: torch.Tensor, longest: tuple[int, int], causal: bool, scale: float
):
    """out_THD, and lse_HT in float32, +inf where a query sees nothing."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, lse, *_ = _flash_attn_varlen_forward(
        q_THD, k_UGD, v_UGD, *bounds, *_beyond_one(longest),
        dropout_p=0.0, softmax_scale=scale, causal=causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return out, lse


def backward(
    dout_THD, q_THD, k_UGD, v_UGD, out_THD, lse_HT, bounds: torch.Tensor, longest: tuple[int, int],
    causal: bool, scale: float, deterministic: bool,
):  # fmt: skip
    """dq_THD, dk_UGD, dv_UGD from the final, merged ``out`` and ``lse``, which is contiguous."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    gradients = [torch.empty_like(x) for x in (q_THD, k_UGD, v_UGD)]
    _flash_attn_varlen_backward(
        dout_THD, q_THD, k_UGD, v_UGD, out_THD, lse_HT, *gradients, *bounds, *_beyond_one(longest),
        dropout_p=0.0, softmax_scale=scale, causal=causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=deterministic,
    )  # fmt: skip
    return gradients


def _beyond_one(longest: tuple[int, int]) -> tuple[int, int]:
    """Told of no more than one query, it takes each sequence to have exactly one: it is told of two."""
    queries, keys = longest
    return max(queries, 2), keys
