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

What each operator assumes about the memory of its tensors was read in the sources named beside it,
in the versions of torch from 2.8 to 2.13.
"""

import torch
from torch.nn.functional import pad

from megatron_ring.kernels.attention.tiled_kernel import TileOperator
from megatron_ring.kernels.memory_contract import (
    HALF_PRECISION,
    UNRESTRICTED,
    Memory,
    VendorOperator,
)

aten = torch.ops.aten

# Vector loads of 16 bytes along the head dim; the other strides are read.
_ROWS = Memory(dense=(3,), alignment=16, dtypes=HALF_PRECISION)
_LSE = Memory(dense=(0, 1, 2), dtypes=(torch.float32,))
# Random states are read only with dropout.
_RANDOM_STATES = {"philox_seed": UNRESTRICTED, "philox_offset": UNRESTRICTED}


def _heads_first(*tensors_BLHD: torch.Tensor) -> list[torch.Tensor]:
    """Views of (B, L, H, D) as (B, H, L, D), the order of torch's operators, or back."""
    return [x.transpose(1, 2) for x in tensors_BLHD]


# ---- flash for CPUs ----

# FlashAttentionKernel.cpp reads all strides but those of the head dim, and does not check these:
# with others its results are wrong, or oneDNN refuses them. The output's gradient, lse and the mask
# may have any. The tests call it.
_CPU_ROWS = Memory(dense=(3,))
_CPU_FORWARD = VendorOperator(
    "torch's flash attention for CPUs",
    aten._scaled_dot_product_flash_attention_for_cpu,
    {name: _CPU_ROWS for name in ("query", "key", "value")} | {"attn_mask": UNRESTRICTED},
)
_CPU_BACKWARD = VendorOperator(
    "torch's flash attention for CPUs, backward",
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    {name: _CPU_ROWS for name in ("query", "key", "value", "out")}
    | {name: UNRESTRICTED for name in ("grad_out", "logsumexp", "attn_mask")},
)


def _cpu_flash_forward(q_BLHD, k_BMGD, v_BMGD, causal: bool, bias_LM, scale: float):
    q, k, v = _heads_first(q_BLHD, k_BMGD, v_BMGD)
    out, lse = _CPU_FORWARD(
        query=q, key=k, value=v, dropout_p=0.0, is_causal=causal, attn_mask=bias_LM, scale=scale
    )
    return out.transpose(1, 2), lse


def _cpu_flash_backward(
    dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD, lse_BHL, causal: bool, bias_LM, scale: float
):
    dout, q, k, v, out = _heads_first(dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD)
    gradients = _CPU_BACKWARD(
        grad_out=dout, query=q, key=k, value=v, out=out, logsumexp=lse_BHL, dropout_p=0.0,
        is_causal=causal, attn_mask=bias_LM, scale=scale,
    )  # fmt: skip
    return tuple(_heads_first(*gradients))


CPU_FLASH = TileOperator(_cpu_flash_forward, _cpu_flash_backward)


# ---- flash for CUDA ----

# flash_attn/flash_api.cpp refuses q, k and v unless the head dim is contiguous. Backward,
# attention_backward.cu copies the output and its gradient where they are not contiguous, but lse is
# read as a dense (batch, heads, tokens) from its address.
_FLASH_FORWARD = VendorOperator(
    "torch's flash attention",
    aten._scaled_dot_product_flash_attention,
    {name: _ROWS for name in ("query", "key", "value")},
)
_FLASH_BACKWARD = VendorOperator(
    "torch's flash attention, backward",
    aten._scaled_dot_product_flash_attention_backward,
    {name: _ROWS for name in ("query", "key", "value")}
    | {"grad_out": UNRESTRICTED, "out": UNRESTRICTED, "logsumexp": _LSE}
    | {"cum_seq_q": UNRESTRICTED, "cum_seq_k": UNRESTRICTED}
    | _RANDOM_STATES,
)


def _cuda_flash_forward(q_BLHD, k_BMGD, v_BMGD, causal: bool, bias_LM: None, scale: float):
    q, k, v = _heads_first(q_BLHD, k_BMGD, v_BMGD)
    out, lse, *_ = _FLASH_FORWARD(
        query=q, key=k, value=v, dropout_p=0.0, is_causal=causal, scale=scale
    )
    return out.transpose(1, 2), lse


def _cuda_flash_backward(
    dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD, lse_BHL, causal: bool, bias_LM: None, scale: float
):
    dout, q, k, v, out = _heads_first(dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD)
    no_random_state = torch.empty(2, dtype=torch.uint64, device=q.device)
    gradients = _FLASH_BACKWARD(
        grad_out=dout, query=q, key=k, value=v, out=out, logsumexp=lse_BHL,
        cum_seq_q=None, cum_seq_k=None,  # only with packing
        max_q=q.shape[2], max_k=k.shape[2], dropout_p=0.0, is_causal=causal,
        philox_seed=no_random_state, philox_offset=no_random_state, scale=scale,
    )  # fmt: skip
    return tuple(_heads_first(*gradients))


CUDA_FLASH = TileOperator(_cuda_flash_forward, _cuda_flash_backward)


# ---- memory-efficient attention for CUDA ----

# attention.cu and attention_backward.cu refuse q, k, v and bias unless their last dim is
# contiguous, kernel_forward.h and kernel_backward.h unless addresses and strides are aligned.
# Backward they copy the output's gradient where it is not contiguous. They read lse by the strides
# of batch and heads, and refuse these unless they are multiples of 8 elements.
#
# Of the output, in half precision, they read the strides of batch and heads, and take
# heads x head dim for that of tokens (Params::o_strideM in kernel_backward.h). With half of a
# tensor's heads dq and dk are wrong: seen on an H100 with torch 2.11, in bf16 and fp16. In float32
# torch computes delta beforehand and reads the strides; one statement is for both.
#
# torch's public function pads rows of the bias to multiples of 8 elements in every dtype.
_ANY_FLOAT = (*HALF_PRECISION, torch.float32)
_EFFICIENT_ROWS = Memory(dense=(3,), alignment=16, dtypes=_ANY_FLOAT)
_EFFICIENT_BIAS = Memory(dense=(3,), alignment=32, dtypes=_ANY_FLOAT)
_EFFICIENT_FORWARD = VendorOperator(
    "torch's memory-efficient attention",
    aten._scaled_dot_product_efficient_attention,
    {name: _EFFICIENT_ROWS for name in ("query", "key", "value")} | {"attn_bias": _EFFICIENT_BIAS},
)
_EFFICIENT_BACKWARD = VendorOperator(
    "torch's memory-efficient attention, backward",
    aten._scaled_dot_product_efficient_attention_backward,
    {name: _EFFICIENT_ROWS for name in ("query", "key", "value")}
    | {
        "attn_bias": _EFFICIENT_BIAS,
        "grad_out_": UNRESTRICTED,
        "out": Memory(dense=(2, 1, 3), alignment=16, dtypes=_ANY_FLOAT),
        "logsumexp": Memory(dense=(2,), alignment=32, dtypes=(torch.float32,)),
    }
    | _RANDOM_STATES,
)


def _efficient_forward(q_BLHD, k_BMGD, v_BMGD, causal: bool, bias_LM, scale: float):
    k_BMHD, v_BMHD = (_repeat_heads(x, q_BLHD) for x in (k_BMGD, v_BMGD))
    q, k, v = _heads_first(q_BLHD, k_BMHD, v_BMHD)
    out, lse, *_ = _EFFICIENT_FORWARD(
        query=q, key=k, value=v, attn_bias=_bias_of_all_heads(bias_LM, q), compute_log_sumexp=True,
        dropout_p=0.0, is_causal=causal, scale=scale,
    )  # fmt: skip
    return out.transpose(1, 2), lse[:, :, : q.shape[2]]  # lse is padded to whole warps


def _efficient_backward(
    dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD, lse_BHL, causal: bool, bias_LM, scale: float
):
    k_BMHD, v_BMHD = (_repeat_heads(x, q_BLHD) for x in (k_BMGD, v_BMGD))
    dout, q, k, v, out = _heads_first(dout_BLHD, q_BLHD, k_BMHD, v_BMHD, out_BLHD)
    # Padding, and rows that see nothing in any hop, get weight 0: exp(score - inf).
    lse_BHL = lse_BHL.masked_fill(lse_BHL == -torch.inf, torch.inf)
    padded = pad(lse_BHL, (0, -lse_BHL.shape[-1] % 32), value=torch.inf)
    no_random_state = torch.empty((), dtype=torch.int64, device=q.device)
    *gradients, _ = _EFFICIENT_BACKWARD(
        grad_out_=dout, query=q, key=k, value=v, attn_bias=_bias_of_all_heads(bias_LM, q), out=out,
        logsumexp=padded, philox_seed=no_random_state, philox_offset=no_random_state,
        dropout_p=0.0, grad_input_mask=[True, True, True, False], is_causal=causal, scale=scale,
    )  # fmt: skip
    dq, dk, dv = _heads_first(*gradients)
    return dq, *(x.unflatten(2, (k_BMGD.shape[2], -1)).sum(3) for x in (dk, dv))


def _repeat_heads(kv_BMGD: torch.Tensor, q_BLHD: torch.Tensor) -> torch.Tensor:
    """Repeat key-value heads for their query heads: the efficient operator has no grouped heads."""
    repeats = q_BLHD.shape[2] // kv_BMGD.shape[2]
    return kv_BMGD.repeat_interleave(repeats, dim=2) if repeats > 1 else kv_BMGD


def _bias_of_all_heads(bias_LM: torch.Tensor | None, q_BHLD: torch.Tensor) -> torch.Tensor | None:
    return None if bias_LM is None else bias_LM.expand(*q_BHLD.shape[:2], -1, -1)


CUDA_EFFICIENT = TileOperator(_efficient_forward, _efficient_backward)


# ---- cuDNN ----

# cudnn/MHA.cpp passes the strides of every tensor to cuDNN, which loads 16 bytes along the head
# dim. Backward it caches a plan by the strides of q, k and v, and uses it whatever strides the
# output, its gradient and lse have later. So these always have the same.
_ALWAYS_THE_SAME = Memory(dense=(0, 2, 1, 3), alignment=16, dtypes=HALF_PRECISION)
_CUDNN_FORWARD = VendorOperator(
    "cuDNN's attention",
    aten._scaled_dot_product_cudnn_attention,
    {name: _ROWS for name in ("query", "key", "value")} | {"attn_bias": UNRESTRICTED},
)
_CUDNN_BACKWARD = VendorOperator(
    "cuDNN's attention, backward",
    aten._scaled_dot_product_cudnn_attention_backward,
    {name: _ROWS for name in ("query", "key", "value")}
    | {
        "grad_out": _ALWAYS_THE_SAME,
        "out": _ALWAYS_THE_SAME,
        "logsumexp": Memory(dense=(0, 1, 2, 3), dtypes=(torch.float32,)),
    }
    | {"attn_bias": UNRESTRICTED, "cum_seq_q": UNRESTRICTED, "cum_seq_k": UNRESTRICTED}
    | _RANDOM_STATES,
)


def _cudnn_forward(q_BLHD, k_BMGD, v_BMGD, causal: bool, bias_LM: None, scale: float):
    q, k, v = _heads_first(q_BLHD, k_BMGD, v_BMGD)
    out, lse_BHL1, *_ = _CUDNN_FORWARD(
        query=q, key=k, value=v, attn_bias=None, compute_log_sumexp=True, dropout_p=0.0,
        is_causal=causal, scale=scale,
    )  # fmt: skip
    return out.transpose(1, 2), lse_BHL1.squeeze(-1)  # the last dim exists from torch 2.9 on


def _cudnn_backward(
    dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD, lse_BHL, causal: bool, bias_LM: None, scale: float
):
    dout, q, k, v, out = _heads_first(dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD)
    no_seed = torch.empty((), dtype=torch.int64, device=q.device)
    gradients = _CUDNN_BACKWARD(
        grad_out=dout, query=q, key=k, value=v, out=out, logsumexp=lse_BHL.unsqueeze(-1),
        philox_seed=no_seed, philox_offset=no_seed, attn_bias=None,
        cum_seq_q=None, cum_seq_k=None,  # only with packing
        max_q=q.shape[2], max_k=k.shape[2], dropout_p=0.0, is_causal=causal, scale=scale,
    )  # fmt: skip
    return tuple(_heads_first(*gradients))


CUDNN = TileOperator(_cudnn_forward, _cudnn_backward)
