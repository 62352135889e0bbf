"""Attention as it is defined, over a whole sample, in plain torch and float64: what the self-test compares with.

It shares no line with the kernels, the masks and the ring, so that they cannot be wrong alike.
"""

from typing import NamedTuple

import torch


class Attended(NamedTuple):
    """What attention gives, and its gradients, as (batch, tokens, heads, head size)."""

    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def plain_attention(
    q_BSHD: torch.Tensor,
    k_BSGD: torch.Tensor,
    v_BSGD: torch.Tensor,
    dout_BSHD: torch.Tensor,
    window: int,
    documents: list[int],
) -> Attended:
    """softmax(q k^T / sqrt(D)) v over the whole sample, gradients by autograd. ``documents``: where they begin."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q_BSHD, k_BSGD, v_BSGD))
    repeated_k, repeated_v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores_BHSS = torch.einsum("bqhd,bkhd->bhqk", q, repeated_k) * q.shape[-1] ** -0.5
    visible_SS = _visible(q.shape[1], window, documents).to(q.device)
    weights_BHSS = scores_BHSS.masked_fill(~visible_SS, -torch.inf).softmax(-1)
    out_BSHD = torch.einsum("bhqk,bkhd->bqhd", weights_BHSS, repeated_v)
    return Attended(out_BSHD, *torch.autograd.grad(out_BSHD, (q, k, v), dout_BSHD.double()))


def _visible(tokens: int, window: int, documents: list[int]) -> torch.Tensor:
    """(query, key): not ahead, in the window if there is one, of the same document."""
    p = torch.arange(tokens)
    document = torch.searchsorted(torch.tensor(documents), p, right=True)
    back = p[:, None] - p
    return (back >= 0) & (back < (window or tokens)) & (document[:, None] == document)
