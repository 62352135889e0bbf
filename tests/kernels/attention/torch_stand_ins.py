"""Stand-ins for torch's attention operators for CUDA, registered under their schemas on a CPU.

They compute in float64 and read memory as the operators do (sources in torch_operators.py): what an
operator refuses raises RuntimeError, what it copies first may have any strides, and what it reads
without looking at the strides is read that way.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tests.kernels.attention.float64_attention import HALF_PRECISION, attend, attend_backward
from tests.kernels.raw_memory import (
    read_as_dense,
    read_with_strides,
    refuse_misaligned,
    refuse_strided_rows,
)

# cuDNN's plans for backward: the strides of out, dout and lse by the shapes and strides of q, k, v.
_PLANS: dict[tuple, list[tuple[int, ...]]] = {}


@contextmanager
def stand_ins_for_cuda_operators() -> Iterator[None]:
    """Register the stand-ins; the dispatcher checks every call against the operator's schema."""
    _PLANS.clear()
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in ("flash", "efficient", "cudnn"):
            for suffix in ("", "_backward"):
                implementation = globals()[f"_{name}{suffix}"]
                library.impl(f"_scaled_dot_product_{name}_attention{suffix}", implementation, "CPU")
        yield


def _flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    refuse_strided_rows(q=q, k=k, v=v)
    out, lse = _forward(q, k, v, is_causal, scale)
    unused = torch.empty(0)
    return out, lse, unused, unused, q.shape[2], k.shape[2], torch.zeros(2), torch.empty(0), unused


def _flash_backward(
    dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *,
    scale=None,
):  # fmt: skip
    assert (max_q, max_k, dropout_p) == (q.shape[2], k.shape[2], 0.0)
    refuse_strided_rows(q=q, k=k, v=v)
    return _backward(dout, q, k, v, out, read_as_dense(lse), is_causal, scale)


def _cudnn(
    q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
    return_debug_mask=False, *, scale=None,
):  # fmt: skip
    assert attn_bias is None
    assert compute_log_sumexp
    assert min(q.shape[2], k.shape[2]) > 1, "cuDNN does not support sequences of length 1"
    refuse_misaligned(8, q=q, k=k, v=v)
    out, lse = _forward(q, k, v, is_causal, scale)
    unused, scalar = torch.empty(0), torch.zeros(())
    lengths = q.shape[2], k.shape[2]
    return out, lse.unsqueeze(-1), unused, unused, *lengths, scalar, scalar, unused


def _cudnn_backward(
    dout, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout_p, is_causal,
    *, scale=None,
):  # fmt: skip
    assert (max_q, max_k, dropout_p) == (q.shape[2], k.shape[2], 0.0)
    assert bias is cum_q is cum_k is None
    assert (seed.dtype, offset.dtype) == (torch.int64, torch.int64)
    assert lse.shape[-1] == 1
    refuse_misaligned(8, q=q, k=k, v=v, out=out, dout=dout)
    shapes_and_strides = tuple((tuple(x.shape), x.stride()) for x in (q, k, v))
    strides = _PLANS.setdefault(shapes_and_strides, [x.stride() for x in (dout, out, lse)])
    dout, out, lse = map(read_with_strides, (dout, out, lse), strides)
    return _backward(dout, q, k, v, out, lse.squeeze(-1), is_causal, scale)


def _efficient(
    q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None
):
    assert compute_log_sumexp
    assert q.shape[1] == k.shape[1], "the operator does not support grouped heads"
    _refuse_what_efficient_refuses(q, k, v)
    bias = _bias_of_one_head(attn_bias, q, k)
    out, lse = _forward(q, k, v, is_causal, scale, bias, (*HALF_PRECISION, torch.float32))
    padded = torch.full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), torch.nan)
    padded[..., : lse.shape[2]] = lse.masked_fill(lse == -torch.inf, 0.0)
    return out, padded, torch.zeros(()), torch.zeros(())


def _efficient_backward(
    dout, q, k, v, attn_bias, out, lse, seed, offset, dropout_p, grad_input_mask, is_causal=False,
    *, scale=None,
):  # fmt: skip
    assert lse.shape[-1] % 32 == 0, "lse is padded to whole warps"
    assert list(grad_input_mask) == [True, True, True, False]
    _refuse_what_efficient_refuses(q, k, v)
    refuse_misaligned(8, lse=lse)
    if q.dtype in HALF_PRECISION:
        out = read_as_dense(out, (2, 1, 3))
    bias = _bias_of_one_head(attn_bias, q, k)
    dtypes = (*HALF_PRECISION, torch.float32)
    lse = read_as_dense(lse, (2,))[..., : q.shape[2]]
    return *_backward(dout, q, k, v, out, lse, is_causal, scale, bias, dtypes), None


def _refuse_what_efficient_refuses(q, k, v) -> None:
    refuse_strided_rows(q=q, k=k, v=v)
    refuse_misaligned(16 // q.itemsize, q=q, k=k, v=v)


def _bias_of_one_head(bias, q, k) -> torch.Tensor | None:
    """Check the bias and return that of one head, because all heads have the same."""
    if bias is None:
        return None
    assert (bias.dtype, tuple(bias.shape)) == (q.dtype, (*q.shape[:3], k.shape[2]))
    refuse_strided_rows(bias=bias)
    refuse_misaligned(8, bias=bias)
    return bias[0, 0]


def _forward(q, k, v, causal: bool, scale: float, bias=None, dtypes=HALF_PRECISION):
    """Attention of (batch, heads, tokens, head dim): out with the strides of q, lse in float32."""
    assert q.dtype in dtypes
    assert q.dtype == k.dtype == v.dtype
    results = [
        attend(*(x.transpose(0, 1) for x in sample), causal, scale, bias) for sample in zip(q, k, v)
    ]
    outs, lses = zip(*results)
    return torch.stack(outs).to(q.dtype).transpose(1, 2), torch.stack(lses).float()


def _backward(
    dout, q, k, v, out, lse, causal: bool, scale: float, bias=None, dtypes=HALF_PRECISION
):
    assert q.dtype in dtypes
    assert all(x.dtype == q.dtype for x in (dout, k, v, out))
    assert lse.dtype == torch.float32
    samples = zip(*(x.transpose(1, 2) for x in (dout, q, k, v, out)), lse)
    gradients = zip(*(attend_backward(*sample, causal, scale, bias) for sample in samples))
    return tuple(torch.stack(parts).to(q.dtype).transpose(1, 2) for parts in gradients)
