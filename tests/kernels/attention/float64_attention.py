"""Attention in float64 for the stand-ins for vendors' kernels.

Each stand-in has the names, order and defaults of the library's own parameters, so that a wrong
call is an error here, and refuses what the library refuses. Where a library leaves memory
unwritten, the stand-in writes nan.
"""

from collections.abc import Iterator

import torch

from tests.kernels.raw_memory import read_as_dense, refuse_misaligned, refuse_strided_rows

HALF_PRECISION = torch.bfloat16, torch.float16


def attend(q_LHD, k_MGD, v_MGD, causal: bool, scale: float, bias_LM=None):
    """Return out_LHD and lse_HL, -inf for masked rows; causal is aligned at the bottom right."""
    scores = _scores(q_LHD, k_MGD, causal, scale, bias_LM)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("hlm,mhd->lhd", weights, _per_query_head(v_MGD, q_LHD)), lse


def attend_backward(dout, q, k, v, out, lse_HL, causal: bool, scale: float, bias_LM=None):
    """Return dq, dk, dv, computed from the given ``out`` and ``lse``."""
    weights = (_scores(q, k, causal, scale, bias_LM) - lse_HL[..., None].double()).exp()
    dout = dout.double()
    delta = (dout * out.double()).sum(-1).T[..., None]
    dweights = torch.einsum("lhd,mhd->hlm", dout, _per_query_head(v, q))
    dscores = weights * (dweights - delta) * scale
    dq = torch.einsum("hlm,mhd->lhd", dscores, _per_query_head(k, q))
    dk = torch.einsum("hlm,lhd->mhd", dscores, q.double())
    dv = torch.einsum("hlm,lhd->mhd", weights, dout)
    return dq, *(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))


def _scores(q, k, causal, scale, bias) -> torch.Tensor:
    scores = torch.einsum("lhd,mhd->hlm", q.double(), _per_query_head(k, q)) * scale
    if causal:
        surplus = scores.shape[2] - scores.shape[1]
        masked = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + surplus)
        scores = scores.masked_fill(masked, -torch.inf)
    return scores if bias is None else scores + bias


def _per_query_head(kv_MGD, q_LHD) -> torch.Tensor:
    return kv_MGD.double().repeat_interleave(q_LHD.shape[1] // kv_MGD.shape[1], dim=1)


def varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q: int, max_k: int, causal: bool, scale: float,
    masked_lse: float,
):  # fmt: skip
    """Return out_THD and lse_HT of either version of flash-attn, for sequences end to end.

    masked_lse: the lse of a query that sees nothing.
    """
    _check_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k)
    out = torch.full_like(q, torch.nan)
    lse = torch.full((q.shape[1], len(q)), torch.nan)
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k, max_q, max_k):
        out[rows], lse[:, rows] = attend(q[rows], k[keys], v[keys], causal, scale)
    return out, lse.masked_fill(lse == -torch.inf, masked_lse)


def varlen_backward(
    dout, q, k, v, out, lse, gradients, cu_seqlens_q, cu_seqlens_k, max_q: int, max_k: int,
    causal: bool, scale: float,
) -> None:  # fmt: skip
    """Write dq, dk and dv of sequences end to end into ``gradients``."""
    _check_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, dout, out, *gradients)
    assert (lse.dtype, tuple(lse.shape)) == (torch.float32, (q.shape[1], len(q)))
    lse = read_as_dense(lse)  # both versions look at its address alone
    for gradient in gradients:
        gradient.fill_(torch.nan)
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k, max_q, max_k):
        results = attend_backward(
            dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows], causal, scale
        )
        for gradient, span, value in zip(gradients, (rows, keys, keys), results):
            gradient[span] = value


def _check_inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, *others) -> None:
    tensors = (q, k, v, *others)
    assert q.dtype in HALF_PRECISION
    assert all(x.dtype == q.dtype for x in tensors)
    assert all(x.dim() == 3 for x in tensors)
    for x in tensors:
        refuse_strided_rows(x=x)
        refuse_misaligned(8, x=x)  # the kernels load 16 bytes; on a GPU this is an illegal address
    assert q.shape[2] % 8 == 0
    assert q.shape[2] <= 256
    assert q.shape[1] % k.shape[1] == 0
    for cu_seqlens, tensor in ((cu_seqlens_q, q), (cu_seqlens_k, k)):
        assert cu_seqlens.dtype == torch.int32
        refuse_strided_rows(cu_seqlens=cu_seqlens)
        assert int(cu_seqlens[-1]) == len(tensor)
        assert (cu_seqlens.diff() >= 0).all()


def _sequences(cu_seqlens_q, cu_seqlens_k, max_q: int, max_k: int) -> Iterator[tuple[slice, slice]]:
    """Yield the queries and keys of each sequence, as far as a grid over the longest reaches."""
    spans_q = cu_seqlens_q.unfold(0, 2, 1).tolist()
    spans_k = cu_seqlens_k.unfold(0, 2, 1).tolist()
    for (start, stop), (first, last) in zip(spans_q, spans_k):
        yield slice(start, min(stop, start + max_q)), slice(first, min(last, first + max_k))
