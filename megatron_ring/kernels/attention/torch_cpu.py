"""A tile by torch's flash kernel for CPUs: any mask, any type, fewer key-value heads, any head size.

Torch's public function hides the log-sum-exp, without which blocks cannot be merged, hence ``torch.ops.aten``.
"""

import torch

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(q_BLHD, k_BMGD, v_BMGD, causal: bool, bias_LM: torch.Tensor | None, scale: float):
    """As in ``Operator``; lse is 0 where a row sees nothing."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BMGD, v_BMGD))
    out, lse = _forward(q, k, v, 0.0, causal, attn_mask=bias_LM, scale=scale)
    return out.transpose(1, 2), lse


def backward(
    dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD, lse_BHL, causal: bool, bias_LM, scale: float
):
    """As in ``Operator``."""
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD))
    gradients = _backward(dout, q, k, v, out, lse_BHL, 0.0, causal, attn_mask=bias_LM, scale=scale)
    return tuple(x.transpose(1, 2) for x in gradients)
