"""RMSNorm (Zhang and Sennrich 2019) with the residual add before it, each direction in one pass.

The operators are custom ops, so that a dispatch mode sees one operator with its tensors, and the
meta device can run them. Everything is computed in float32; the sum is rounded once before it is
normalized, as it would be by a separate add, and the result once.

In this file ``N`` is the rows, B x l, and ``R`` the programs of a backward launch.
"""

import torch
import triton
import triton.language as tl

from megatron_ring.kernels.fused.triton.launch import as_rows, programs_for, warps_for


@triton.jit
def _forward_kernel(
    x, added, weight, total, normalized, rstd, x_stride, added_stride, width, epsilon,
    HAS_ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program normalizes one row; rows of the results are dense."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    exists = column < width
    x_E = tl.load(x + row * x_stride + column, mask=exists, other=0.0).to(tl.float32)
    if HAS_ADDED:
        added_E = tl.load(added + row * added_stride + column, mask=exists, other=0.0)
        sum_E = (x_E + added_E.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * width + column, sum_E, mask=exists)
        x_E = sum_E.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x_E * x_E, axis=0) / width + epsilon)
    weight_E = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    result_E = x_E * inverse * weight_E
    at = normalized + row * width + column
    tl.store(at, result_E.to(normalized.dtype.element_ty), mask=exists)
    tl.store(rstd + row, inverse)


@triton.jit
def _backward_kernel(
    dnormalized, dtotal, total, weight, rstd, dx, dweight, dnormalized_stride, dtotal_stride,
    total_stride, rows, width, HAS_DTOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program takes every R-th row and sums these rows' gradients of the weight."""
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    exists = column < width
    weight_E = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    dweight_E = tl.zeros((BLOCK,), tl.float32)
    for turn in range(tl.cdiv(rows - tl.program_id(0), step)):
        row = first + turn * step
        at = dnormalized + row * dnormalized_stride + column
        dnormalized_E = tl.load(at, mask=exists, other=0.0).to(tl.float32)
        at = total + row * total_stride + column
        unit_E = tl.load(at, mask=exists, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row)
        unit_E = unit_E * inverse
        dweight_E += dnormalized_E * unit_E
        dunit_E = dnormalized_E * weight_E
        projection = tl.sum(dunit_E * unit_E, axis=0) / width
        dx_E = (dunit_E - unit_E * projection) * inverse
        if HAS_DTOTAL:
            at = dtotal + row * dtotal_stride + column
            dx_E += tl.load(at, mask=exists, other=0.0).to(tl.float32)
        tl.store(dx + row * width + column, dx_E.to(dx.dtype.element_ty), mask=exists)
    tl.store(dweight + first * width + column, dweight_E, mask=exists)


@torch.library.custom_op("megatron_ring::add_rms_norm", mutates_args=())
def add_rms_norm(
    x_BlE: torch.Tensor, added_BlE: torch.Tensor | None, weight_E: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x + added, its RMSNorm, and the inverse root mean square of each row in float32.

    Without ``added`` nothing is added and the first result is empty.
    """
    x_NE = as_rows(x_BlE)
    added_NE = None if added_BlE is None else as_rows(added_BlE)
    total_BlE, normalized_BlE, rstd_N = _results(x_BlE, added_BlE)
    rows, width = x_NE.shape
    block = triton.next_power_of_2(width)
    if rows:
        _forward_kernel[(rows,)](
            x_NE, added_NE, weight_E, total_BlE, normalized_BlE, rstd_N, x_NE.stride(0),
            0 if added_NE is None else added_NE.stride(0), width, epsilon,
            HAS_ADDED=added_NE is not None, BLOCK=block, num_warps=warps_for(block),
        )  # fmt: skip
    return total_BlE, normalized_BlE, rstd_N


@torch.library.custom_op("megatron_ring::add_rms_norm_backward", mutates_args=())
def add_rms_norm_backward(
    dnormalized_BlE: torch.Tensor,
    dtotal_BlE: torch.Tensor | None,
    total_BlE: torch.Tensor,
    weight_E: torch.Tensor,
    rstd_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of the sum, and of the weight in float32: R rows that add up to it."""
    dnormalized_NE, total_NE = as_rows(dnormalized_BlE), as_rows(total_BlE)
    dtotal_NE = None if dtotal_BlE is None else as_rows(dtotal_BlE)
    rows, width = total_NE.shape
    dx_BlE, dweight_RE = _gradients(total_BlE)
    block = triton.next_power_of_2(width)
    if rows:
        _backward_kernel[(len(dweight_RE),)](
            dnormalized_NE, dtotal_NE, total_NE, weight_E, rstd_N, dx_BlE, dweight_RE,
            dnormalized_NE.stride(0), 0 if dtotal_NE is None else dtotal_NE.stride(0),
            total_NE.stride(0), rows, width,
            HAS_DTOTAL=dtotal_NE is not None, BLOCK=block, num_warps=warps_for(block),
        )  # fmt: skip
    return dx_BlE, dweight_RE


@add_rms_norm.register_fake
def _(x_BlE, added_BlE, weight_E, epsilon):
    return _results(x_BlE, added_BlE)


@add_rms_norm_backward.register_fake
def _(dnormalized_BlE, dtotal_BlE, total_BlE, weight_E, rstd_N):
    return _gradients(total_BlE)


def _results(
    x_BlE: torch.Tensor, added_BlE: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total_BlE = x_BlE.new_empty(0 if added_BlE is None else x_BlE.shape)
    rows = x_BlE.shape[:-1].numel()
    return total_BlE, x_BlE.new_empty(x_BlE.shape), x_BlE.new_empty(rows, dtype=torch.float32)


def _gradients(total_BlE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    *leading, width = total_BlE.shape
    programs = programs_for(total_BlE.device, torch.Size(leading).numel())
    return total_BlE.new_empty(total_BlE.shape), total_BlE.new_empty(
        (programs, width), dtype=torch.float32
    )


class AddRMSNorm(torch.autograd.Function):
    """(x, added or None, weight, epsilon) -> (x + added, its norm).

    Backward adds the gradient of the sum, which arrives along the residual stream, to that of the
    norm in the same pass.
    """

    @staticmethod
    def forward(ctx, x_BlE, added_BlE, weight_E, epsilon):
        total_BlE, normalized_BlE, rstd_N = add_rms_norm(x_BlE, added_BlE, weight_E, epsilon)
        ctx.adds = added_BlE is not None
        total_BlE = total_BlE if ctx.adds else x_BlE.view_as(x_BlE)
        ctx.save_for_backward(total_BlE if ctx.adds else x_BlE, weight_E, rstd_N)
        ctx.set_materialize_grads(False)
        return total_BlE, normalized_BlE

    @staticmethod
    def backward(ctx, dtotal_BlE, dnormalized_BlE):
        total_BlE, weight_E, rstd_N = ctx.saved_tensors
        if dnormalized_BlE is None:
            return dtotal_BlE, dtotal_BlE if ctx.adds else None, None, None
        dx_BlE, dweight_RE = add_rms_norm_backward(
            dnormalized_BlE, dtotal_BlE, total_BlE, weight_E, rstd_N
        )
        dweight_E = dweight_RE.sum(0).to(weight_E.dtype)
        return dx_BlE, dx_BlE if ctx.adds else None, dweight_E, None
