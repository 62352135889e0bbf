"""Torch's own attention operators as tile operators.

They are called through ``torch.ops.aten``, because torch's public function does not return the
log-sum-exp, without which tiles cannot be merged. The CUDA ones were written from the operators'
schemas and torch's source. The tests check the calls against these schemas.

| operator | takes | lse |
| --- | --- | --- |
| CPU_FLASH | any mask, dtype and head dim; grouped heads | 0 for a row that sees nothing |
| CUDA_FLASH | FULL and CAUSAL tiles in fp16 and bf16; grouped heads | |
| CUDA_EFFICIENT | any mask in fp16, bf16, float32; heads are repeated | padded to whole warps |
| CUDNN | FULL and CAUSAL tiles in fp16 and bf16, at least 2 x 2; grouped heads | a last dim of 1 |

Under ``torch.use_deterministic_algorithms`` CUDA_FLASH and CUDA_EFFICIENT accumulate in a fixed
order, according to their source. CUDNN does not.
"""

import torch
from torch.nn.functional import pad

from megatron_ring.kernels.attention.tiled_kernel import TileOperator

aten = torch.ops.aten


def _heads_first(*tensors_BLHD: torch.Tensor) -> list[torch.Tensor]:
    """Views of (B, L, H, D) as (B, H, L, D), the order of torch's operators, or back."""
    return [x.transpose(1, 2) for x in tensors_BLHD]


# ---- flash for CPUs ----


def _cpu_flash_forward(q_BLHD, k_BMGD, v_BMGD, causal: bool, bias_LM, scale: float):
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *_heads_first(q_BLHD, k_BMGD, v_BMGD), 0.0, causal, attn_mask=bias_LM, scale=scale
    )
    return out.transpose(1, 2), lse


def _cpu_flash_backward(
    dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD, lse_BHL, causal: bool, bias_LM, scale: float
):
    gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_heads_first(dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD),
        lse_BHL, 0.0, causal, attn_mask=bias_LM, scale=scale,
    )  # fmt: skip
    return tuple(_heads_first(*gradients))


CPU_FLASH = TileOperator(_cpu_flash_forward, _cpu_flash_backward)


# ---- flash for CUDA ----


def _cuda_flash_forward(q_BLHD, k_BMGD, v_BMGD, causal: bool, bias_LM: None, scale: float):
    out, lse, *_ = aten._scaled_dot_product_flash_attention(
        *_heads_first(q_BLHD, k_BMGD, v_BMGD), 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse


def _cuda_flash_backward(
    dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD, lse_BHL, causal: bool, bias_LM: None, scale: float
):
    dout, q, k, v, out = _heads_first(dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD)
    # The random state is read only with dropout, and the cumulative lengths only with packing.
    no_lengths = None
    no_random_state = torch.empty(2, dtype=torch.uint64, device=q.device)
    gradients = aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse_BHL.contiguous(), no_lengths, no_lengths, q.shape[2], k.shape[2],
        0.0, causal, no_random_state, no_random_state, scale=scale,
    )  # fmt: skip
    return tuple(_heads_first(*gradients))


CUDA_FLASH = TileOperator(_cuda_flash_forward, _cuda_flash_backward)


# ---- memory-efficient attention for CUDA ----


def _efficient_forward(q_BLHD, k_BMGD, v_BMGD, causal: bool, bias_LM, scale: float):
    k_BMHD, v_BMHD = (_repeat_heads(x, q_BLHD) for x in (k_BMGD, v_BMGD))
    q, k, v = _heads_first(q_BLHD, k_BMHD, v_BMHD)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        q, k, v, _aligned_bias(bias_LM, q), True, 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse[:, :, : q.shape[2]]  # lse is padded to whole warps


def _efficient_backward(
    dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD, lse_BHL, causal: bool, bias_LM, scale: float
):
    # In half precision the operator reads out as dense (batch, tokens, heads, head dim), whatever
    # its strides: seen on an H100 with torch 2.11. A slice of heads or of tokens is not dense.
    out_BLHD = out_BLHD.contiguous()
    k_BMHD, v_BMHD = (_repeat_heads(x, q_BLHD) for x in (k_BMGD, v_BMGD))
    dout, q, k, v, out = _heads_first(dout_BLHD, q_BLHD, k_BMHD, v_BMHD, out_BLHD)
    # Padding, and rows that see nothing in any hop, get weight 0: exp(score - inf).
    lse_BHL = lse_BHL.masked_fill(lse_BHL == -torch.inf, torch.inf)
    padded = pad(lse_BHL, (0, -lse_BHL.shape[-1] % 32), value=torch.inf)
    no_random_state = torch.empty((), dtype=torch.int64, device=q.device)
    *gradients, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, _aligned_bias(bias_LM, q), out, padded, no_random_state, no_random_state,
        0.0, [True, True, True, False], causal, scale=scale,
    )  # fmt: skip
    dq, dk, dv = _heads_first(*gradients)
    return dq, *(x.unflatten(2, (k_BMGD.shape[2], -1)).sum(3) for x in (dk, dv))


def _repeat_heads(kv_BMGD: torch.Tensor, q_BLHD: torch.Tensor) -> torch.Tensor:
    """Repeat key-value heads for their query heads: the efficient operator has no grouped heads."""
    return kv_BMGD.repeat_interleave(q_BLHD.shape[2] // kv_BMGD.shape[2], dim=2)


def _aligned_bias(bias_LM: torch.Tensor | None, q_BHLD: torch.Tensor) -> torch.Tensor | None:
    """Expand the bias to all heads, with row strides that are multiples of 8."""
    if bias_LM is None:
        return None
    keys = bias_LM.shape[-1]
    return pad(bias_LM, (0, -keys % 8))[:, :keys].expand(*q_BHLD.shape[:2], -1, -1)


CUDA_EFFICIENT = TileOperator(_efficient_forward, _efficient_backward)


# ---- cuDNN ----


def _cudnn_forward(q_BLHD, k_BMGD, v_BMGD, causal: bool, bias_LM: None, scale: float):
    out, lse_BHL1, *_ = aten._scaled_dot_product_cudnn_attention(
        *_heads_first(q_BLHD, k_BMGD, v_BMGD), None, True, 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse_BHL1.squeeze(-1)  # the last dim exists from torch 2.9 on


def _cudnn_backward(
    dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD, lse_BHL, causal: bool, bias_LM: None, scale: float
):
    # Some versions of torch cache a plan by the strides of q, k and v alone, and apply it whatever
    # strides out and dout have. So these are always contiguous.
    inputs = dout_BLHD.contiguous(), q_BLHD, k_BMGD, v_BMGD, out_BLHD.contiguous()
    dout, q, k, v, out = _heads_first(*inputs)
    # The random state is read only with dropout, and the cumulative lengths only with packing.
    no_bias, no_lengths = None, None
    no_seed = torch.empty((), dtype=torch.int64, device=q.device)
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse_BHL.contiguous().unsqueeze(-1), no_seed, no_seed, no_bias,
        no_lengths, no_lengths, q.shape[2], k.shape[2], 0.0, causal, scale=scale,
    )  # fmt: skip
    return tuple(_heads_first(*gradients))


CUDNN = TileOperator(_cudnn_forward, _cudnn_backward)
