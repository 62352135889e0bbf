"""The oracle: attention over the whole sequence in plain torch and float64, its gradients by autograd.

Written from softmax(q k^T / sqrt(D)) v alone and sharing no line with the package, so that both cannot be wrong alike.
"""

from typing import NamedTuple

import torch


class Attention(NamedTuple):
    """What attention gives, and its gradients: out and dq (B, S, H, D), dk and dv (B, S, G, D), lse (B, H, S)."""

    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    lse: torch.Tensor


def random_inputs(
    batch: int, tokens: int, heads: int, groups: int, dtype: torch.dtype = torch.float64, head_size: int = 16
) -> list[torch.Tensor]:
    """Standard normal q, k, v and gradient of the output; the same for the same arguments, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(1000 * tokens + heads + groups)
    shapes = [(batch, tokens, each, head_size) for each in (heads, groups, groups, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def attention(
    q_BSHD: torch.Tensor,
    k_BSGD: torch.Tensor,
    v_BSGD: torch.Tensor,
    dout_BSHD: torch.Tensor,
    visible_SS: torch.Tensor | None = None,
) -> Attention:
    """Query head i reads key-value head i // (H / G). ``visible_SS[query, key]`` is causal unless given."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q_BSHD, k_BSGD, v_BSGD))
    queries, keys, groups = q.shape[1], k.shape[1], k.shape[2]
    if visible_SS is None:
        visible_SS = torch.ones(queries, keys, dtype=torch.bool).tril()
    scores = torch.einsum("bqgnd,bkgd->bgnqk", q.unflatten(2, (groups, -1)), k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(visible_SS.logical_not(), -torch.inf)
    out = torch.einsum("bgnqk,bkgd->bqgnd", scores.softmax(-1), v).flatten(2, 3)
    gradients = torch.autograd.grad(out, (q, k, v), dout_BSHD.double())
    return Attention(out.detach(), *gradients, scores.detach().logsumexp(-1).flatten(1, 2))
