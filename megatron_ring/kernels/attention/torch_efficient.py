"""A tile by the memory-efficient kernel for CUDA in torch's ``scaled_dot_product_attention``: masks, and float32.

Written from the operators' schemas, to which the tests hold it, and never run on a GPU. Under
``torch.use_deterministic_algorithms`` it adds up in one order, by its source.
"""

import torch
from torch.nn.functional import pad

aten = torch.ops.aten


def forward(q_BLHD, k_BMGD, v_BMGD, causal: bool, bias_LM: torch.Tensor | None, scale: float):
    """As in ``Operator``."""
    q, k, v = (
        x.transpose(1, 2) for x in (q_BLHD, *(_repeated(x, q_BLHD) for x in (k_BMGD, v_BMGD)))
    )
    bias = _aligned(bias_LM, q)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse[:, :, : q.shape[2]]  # this operator pads its lse to whole warps


def backward(
    dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD, lse_BHL, causal: bool,
    bias_LM: torch.Tensor | None, scale: float,
):  # fmt: skip
    """As in ``Operator``."""
    # In half precision the operator reads out as dense (batch, tokens, heads, head size), whatever
    # its strides: seen on an H100 with torch 2.11. Some heads or tokens of a batch are not dense.
    out_BLHD = out_BLHD.contiguous()
    repeated = (_repeated(x, q_BLHD) for x in (k_BMGD, v_BMGD))
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout_BLHD, q_BLHD, *repeated, out_BLHD))
    # What is padded, and what sees nothing in any hop, has no weight: exp(score - inf).
    lse_BHL = lse_BHL.masked_fill(lse_BHL == -torch.inf, torch.inf)
    padded = pad(lse_BHL, (0, -lse_BHL.shape[-1] % 32), value=torch.inf)
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    *gradients, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, _aligned(bias_LM, q), out, padded, unused, unused,
        0.0, [True, True, True, False], causal, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, *(x.unflatten(2, (k_BMGD.shape[2], -1)).sum(3) for x in (dk, dv))


def _repeated(kv_BMGD: torch.Tensor, q_BLHD: torch.Tensor) -> torch.Tensor:
    """Key-value heads repeated for their query heads: the efficient operator knows no groups."""
    return kv_BMGD.repeat_interleave(q_BLHD.shape[2] // kv_BMGD.shape[2], dim=2)


def _aligned(bias_LM: torch.Tensor | None, q_BHLD: torch.Tensor) -> torch.Tensor | None:
    """The bias as the efficient operator wants it: one view for all heads, rows that start at multiples of 8."""
    if bias_LM is None:
        return None
    keys = bias_LM.shape[-1]
    return pad(bias_LM, (0, -keys % 8))[:, :keys].expand(*q_BHLD.shape[:2], -1, -1)
