"""Stand-ins for torch's operators for CUDA, put behind their own schemas for tensors on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tests.kernels.attention.stand_ins import TWO_BYTES, attend, attend_backward


@contextmanager
def torchs_operators_for_cuda() -> Iterator[None]:
    """The dispatcher finds them, and holds every call to the operator's schema."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in ("flash", "efficient", "cudnn"):
            for suffix in ("", "_backward"):
                implementation = globals()[f"_{name}{suffix}"]
                library.impl(f"_scaled_dot_product_{name}_attention{suffix}", implementation, "CPU")
        yield


def _flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    out, lse = _forward(q, k, v, is_causal, scale)
    unused = torch.empty(0)
    return out, lse, unused, unused, q.shape[2], k.shape[2], torch.empty(2), torch.empty(0), unused


def _flash_backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    seed,
    offset,
    *,
    scale=None,
):
    assert (max_q, max_k, dropout_p) == (q.shape[2], k.shape[2], 0.0)
    return _backward(dout, q, k, v, out, lse, is_causal, scale)


def _cudnn(
    q,
    k,
    v,
    attn_bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    return_debug_mask=False,
    *,
    scale=None,
):
    assert attn_bias is None
    assert compute_log_sumexp
    assert min(q.shape[2], k.shape[2]) > 1, "it does not support sequences of length 1"
    out, lse = _forward(q, k, v, is_causal, scale)
    unused = torch.empty(0)
    return (
        out,
        lse.unsqueeze(-1),
        unused,
        unused,
        q.shape[2],
        k.shape[2],
        torch.empty(()),
        torch.empty(()),
        unused,
    )


def _cudnn_backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    seed,
    offset,
    bias,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    *,
    scale=None,
):
    assert (max_q, max_k, dropout_p) == (q.shape[2], k.shape[2], 0.0)
    assert bias is cum_q is cum_k is None
    assert (seed.dtype, offset.dtype) == (torch.int64, torch.int64)
    assert all(x.transpose(1, 2).is_contiguous() for x in (dout, out)), (
        "as the plan kept for such queries has them"
    )
    assert lse.is_contiguous()
    assert lse.shape[-1] == 1
    return _backward(dout, q, k, v, out, lse.squeeze(-1), is_causal, scale)


def _efficient(
    q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None
):
    assert compute_log_sumexp
    assert q.shape[1] == k.shape[1], "it knows no groups"
    out, lse = _forward(
        q, k, v, is_causal, scale, _checked(attn_bias, q, k), (*TWO_BYTES, torch.float32)
    )
    padded = torch.full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), torch.nan)
    padded[..., : lse.shape[2]] = lse.masked_fill(lse == -torch.inf, 0.0)
    return out, padded, torch.empty(()), torch.empty(())


def _efficient_backward(
    dout,
    q,
    k,
    v,
    attn_bias,
    out,
    lse,
    seed,
    offset,
    dropout_p,
    grad_input_mask,
    is_causal=False,
    *,
    scale=None,
):
    assert lse.shape[-1] % 32 == 0, "whole warps"
    assert list(grad_input_mask) == [True, True, True, False]
    assert out.transpose(1, 2).is_contiguous(), "in half precision strides are not read"
    inputs = dout, q, k, v, out, lse[..., : q.shape[2]]
    return *_backward(
        *inputs, is_causal, scale, _checked(attn_bias, q, k), (*TWO_BYTES, torch.float32)
    ), None


def _checked(bias, q, k) -> torch.Tensor | None:
    """The bias of one head: all have the same."""
    if bias is None:
        return None
    assert (bias.dtype, tuple(bias.shape)) == (q.dtype, (*q.shape[:3], k.shape[2]))
    assert (bias.stride(3), bias.stride(2) % 8) == (1, 0), "rows that begin at 16 bytes"
    return bias[0, 0]


def _forward(q, k, v, causal: bool, scale: float, bias=None, dtypes=TWO_BYTES):
    """Of (batch, heads, tokens, head size): out as q lies, lse in float32."""
    assert q.dtype in dtypes
    assert q.dtype == k.dtype == v.dtype
    results = [
        attend(*(x.transpose(0, 1) for x in sample), causal, scale, bias) for sample in zip(q, k, v)
    ]
    outs, lses = zip(*results)
    return torch.stack(outs).to(q.dtype).transpose(1, 2), torch.stack(lses).float()


def _backward(dout, q, k, v, out, lse, causal: bool, scale: float, bias=None, dtypes=TWO_BYTES):
    assert all(x.dtype in dtypes and x.dtype == q.dtype for x in (dout, q, k, v, out))
    assert lse.dtype == torch.float32
    samples = zip(*(x.transpose(1, 2) for x in (dout, q, k, v, out)), lse)
    gradients = zip(*(attend_backward(*sample, causal, scale, bias) for sample in samples))
    return tuple(torch.stack(parts).to(q.dtype).transpose(1, 2) for parts in gradients)
