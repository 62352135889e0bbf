"""What vendors' kernels would answer, computed in float64: with their parameters, their demands and their conventions.

Each has the names, the order and the defaults of the library's own parameters, so that a wrong call is an error here,
and it refuses what the library refuses. Where a library leaves memory as it was there is nan.
"""

from collections.abc import Iterator

import torch

TWO_BYTES = torch.bfloat16, torch.float16


def attend(q_LHD, k_MGD, v_MGD, causal: bool, scale: float, bias_LM=None):
    """out_LHD and lse_HL in float64, lse -inf where a query sees nothing; causal is aligned at the bottom right."""
    scores, v = _scores(q_LHD, k_MGD, causal, scale, bias_LM), _per_head(v_MGD, q_LHD)
    lse = scores.logsumexp(-1)
    return torch.einsum("hlm,mhd->lhd", (scores - lse[..., None]).exp().nan_to_num(0.0), v), lse


def attend_backward(dout, q, k, v, out, lse_HL, causal: bool, scale: float, bias_LM=None):
    """dq, dk, dv in float64 from whatever ``out`` and ``lse`` are given."""
    weight = (_scores(q, k, causal, scale, bias_LM) - lse_HL[..., None].double()).exp()
    dout, delta = dout.double(), (dout.double() * out.double()).sum(-1).T[..., None]
    dscore = weight * (torch.einsum("lhd,mhd->hlm", dout, _per_head(v, q)) - delta) * scale
    dk, dv = (
        torch.einsum("hlm,lhd->mhd", dscore, q.double()),
        torch.einsum("hlm,lhd->mhd", weight, dout),
    )
    dq = torch.einsum("hlm,mhd->lhd", dscore, _per_head(k, q))
    return dq, *(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))


def _scores(q, k, causal, scale, bias) -> torch.Tensor:
    scores = torch.einsum("lhd,mhd->hlm", q.double(), _per_head(k, q)) * scale
    if causal:
        unseen = torch.ones(scores.shape[1:], dtype=torch.bool).triu(
            1 + scores.shape[2] - scores.shape[1]
        )
        scores = scores.masked_fill(unseen, -torch.inf)
    return scores if bias is None else scores + bias


def _per_head(kv_MGD, q_LHD) -> torch.Tensor:
    return kv_MGD.double().repeat_interleave(q_LHD.shape[1] // kv_MGD.shape[1], dim=1)


def packed_forward(
    q,
    k,
    v,
    bounds_q,
    bounds_k,
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
    blind: float,
):
    """What either version of flash-attn answers for sequences end to end: out_THD and lse_HT."""
    _demand(q, k, v, bounds_q, bounds_k)
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], len(q)), torch.nan)
    for rows, keys in _sequences(bounds_q, bounds_k, longest_q, longest_k):
        out[rows], lse[:, rows] = attend(q[rows], k[keys], v[keys], causal, scale)
    return out, lse.masked_fill(lse == -torch.inf, blind)


def packed_backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    gradients,
    bounds_q,
    bounds_k,
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
) -> None:
    """Write dq, dk and dv of sequences end to end into ``gradients``."""
    _demand(q, k, v, bounds_q, bounds_k, dout, out, *gradients)
    assert (lse.dtype, tuple(lse.shape)) == (torch.float32, (q.shape[1], len(q)))
    assert lse.is_contiguous(), "its memory is read as it lies"
    for gradient in gradients:
        gradient.fill_(torch.nan)
    for rows, keys in _sequences(bounds_q, bounds_k, longest_q, longest_k):
        found = attend_backward(
            dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows], causal, scale
        )
        for gradient, part, value in zip(gradients, (rows, keys, keys), found):
            gradient[part] = value


def _demand(q, k, v, bounds_q, bounds_k, *others) -> None:
    assert all(x.dtype in TWO_BYTES and x.dtype == q.dtype for x in (q, k, v, *others)), (
        "fp16 or bf16, all alike"
    )
    assert all(x.stride(-1) == 1 and x.dim() == 3 for x in (q, k, v, *others))
    assert q.shape[2] % 8 == 0
    assert q.shape[2] <= 256
    assert q.shape[1] % k.shape[1] == 0
    for bounds, tensor in ((bounds_q, q), (bounds_k, k)):
        assert bounds.dtype == torch.int32
        assert bounds.is_contiguous()
        assert int(bounds[-1]) == len(tensor)
        assert (bounds.diff() >= 0).all()


def _sequences(bounds_q, bounds_k, longest_q: int, longest_k: int) -> Iterator[tuple[slice, slice]]:
    """Queries and keys of each sequence, as far as a grid of blocks over the longest reaches."""
    for (start, stop), (first, last) in zip(
        bounds_q.unfold(0, 2, 1).tolist(), bounds_k.unfold(0, 2, 1).tolist()
    ):
        yield slice(start, min(stop, start + longest_q)), slice(first, min(last, first + longest_k))
