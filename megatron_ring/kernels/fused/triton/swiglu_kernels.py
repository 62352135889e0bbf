"""SwiGLU (Shazeer 2020, equation 6): silu(gate) * up, each direction in one pass.

Computed in float32 and rounded once. Custom ops, as in norm_kernels.py. In this file ``N`` is the
rows, B x l.
"""

import torch
import triton
import triton.language as tl

from megatron_ring.kernels.fused.triton.launch import as_rows, warps_for

BLOCK = 2048
"""Elements of a program; a row is split among several."""


@triton.jit
def _forward_kernel(gate, up, out, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    """One program computes a part of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < width
    gate_F = tl.load(gate + row * gate_stride + column, mask=exists, other=0.0).to(tl.float32)
    up_F = tl.load(up + row * up_stride + column, mask=exists, other=0.0).to(tl.float32)
    out_F = gate_F * tl.sigmoid(gate_F) * up_F
    tl.store(out + row * width + column, out_F.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _backward_kernel(
    dout, gate, up, dgate, dup, dout_stride, gate_stride, up_stride, width, BLOCK: tl.constexpr
):
    """One program computes a part of one row of both gradients."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < width
    dout_F = tl.load(dout + row * dout_stride + column, mask=exists, other=0.0).to(tl.float32)
    gate_F = tl.load(gate + row * gate_stride + column, mask=exists, other=0.0).to(tl.float32)
    up_F = tl.load(up + row * up_stride + column, mask=exists, other=0.0).to(tl.float32)
    sigmoid_F = tl.sigmoid(gate_F)
    silu_F = gate_F * sigmoid_F
    dgate_F = dout_F * up_F * (sigmoid_F + silu_F * (1.0 - sigmoid_F))
    dup_F = dout_F * silu_F
    tl.store(dgate + row * width + column, dgate_F.to(dgate.dtype.element_ty), mask=exists)
    tl.store(dup + row * width + column, dup_F.to(dup.dtype.element_ty), mask=exists)


@torch.library.custom_op("megatron_ring::swiglu", mutates_args=())
def swiglu(gate_BlF: torch.Tensor, up_BlF: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up; dense, with gradients."""
    gate_NF, up_NF = as_rows(gate_BlF), as_rows(up_BlF)
    out_BlF = gate_BlF.new_empty(gate_BlF.shape)
    rows, width = gate_NF.shape
    if rows:
        _forward_kernel[rows, triton.cdiv(width, BLOCK)](
            gate_NF, up_NF, out_BlF, gate_NF.stride(0), up_NF.stride(0), width,
            BLOCK=BLOCK, num_warps=warps_for(BLOCK),
        )  # fmt: skip
    return out_BlF


@torch.library.custom_op("megatron_ring::swiglu_backward", mutates_args=())
def swiglu_backward(
    dout_BlF: torch.Tensor, gate_BlF: torch.Tensor, up_BlF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up."""
    dout_NF, gate_NF, up_NF = (as_rows(x) for x in (dout_BlF, gate_BlF, up_BlF))
    dgate_BlF, dup_BlF = (gate_BlF.new_empty(gate_BlF.shape) for _ in range(2))
    rows, width = gate_NF.shape
    if rows:
        _backward_kernel[rows, triton.cdiv(width, BLOCK)](
            dout_NF, gate_NF, up_NF, dgate_BlF, dup_BlF,
            dout_NF.stride(0), gate_NF.stride(0), up_NF.stride(0), width,
            BLOCK=BLOCK, num_warps=warps_for(BLOCK),
        )  # fmt: skip
    return dgate_BlF, dup_BlF


@swiglu.register_fake
def _(gate_BlF, up_BlF):
    return gate_BlF.new_empty(gate_BlF.shape)


@swiglu_backward.register_fake
def _(dout_BlF, gate_BlF, up_BlF):
    return gate_BlF.new_empty(gate_BlF.shape), gate_BlF.new_empty(gate_BlF.shape)


swiglu.register_autograd(
    lambda ctx, dout_BlF: swiglu_backward(dout_BlF, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
