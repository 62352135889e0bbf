"""The oracle: attention over the whole sequence in plain torch and float64, with autograd.

It is written from softmax(q k^T / sqrt(D)) v alone and shares no code with the package, so that
both cannot have the same bug. Its masks are written from their definition: a token's document, and
the distance between two tokens.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Attention(NamedTuple):
    """Results and gradients: out and dq (B, S, H, D), dk and dv (B, S, G, D), lse (B, H, S)."""

    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    lse: torch.Tensor


def random_inputs(
    batch: int,
    tokens: int,
    heads: int,
    groups: int,
    dtype: torch.dtype = torch.float64,
    head_size: int = 16,
) -> list[torch.Tensor]:
    """Return standard normal q, k, v and dout, rounded to ``dtype``; the same for equal sizes."""
    generator = torch.Generator().manual_seed(1000 * tokens + heads + groups)
    shapes = [(batch, tokens, each, head_size) for each in (heads, groups, groups, heads)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def random_dlse(q_BSHD: torch.Tensor) -> torch.Tensor:
    """Return a standard normal gradient of lse, (B, H, S), in float32 (float64 for float64)."""
    batch, tokens, heads, _ = q_BSHD.shape
    generator = torch.Generator().manual_seed(tokens)
    dlse_BHS = torch.randn(batch, heads, tokens, generator=generator, dtype=torch.float64)
    return dlse_BHS.to(torch.promote_types(q_BSHD.dtype, torch.float32))


def documents(samples: int, tokens: int, lengths: Sequence[int]) -> torch.Tensor:
    """Return document_BS, each token's document: repeated lengths through concatenated samples."""
    numbered = enumerate(itertools.cycle(lengths))
    numbers = itertools.chain.from_iterable(
        itertools.repeat(number, length) for number, length in numbered
    )
    return torch.tensor(list(itertools.islice(numbers, samples * tokens))).view(samples, tokens)


def document_starts(document_BS: torch.Tensor) -> torch.Tensor:
    """Return where documents begin in the concatenated samples; each sample begins a document."""
    begins_BS = torch.ones_like(document_BS, dtype=torch.bool)
    begins_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    return begins_BS.flatten().nonzero().flatten()


def visible(document_BS: torch.Tensor, window: int = 0) -> torch.Tensor:
    """Return visible_BSS[sample, query, key]: same document, causal, and within the window.

    A window of n tokens shows the token itself and the n - 1 before it; 0 is no window.
    """
    p = torch.arange(document_BS.shape[1])
    distance_SS = p[:, None] - p
    near_SS = (distance_SS >= 0) & (distance_SS < (window or len(p)))
    return (document_BS[:, :, None] == document_BS[:, None, :]) & near_SS


def attention(
    q_BSHD: torch.Tensor,
    k_BSGD: torch.Tensor,
    v_BSGD: torch.Tensor,
    dout_BSHD: torch.Tensor,
    visible_BSS: torch.Tensor | None = None,
    dlse_BHS: torch.Tensor | None = None,
) -> Attention:
    """Compute attention and its gradients; query head i reads key-value head i // (H / G).

    Args:
        visible_BSS: mask [..., query, key], or one (S, S) for all samples; causal by default.
        dlse_BHS: gradient of the log-sum-exp; 0 by default.
    """
    q, k, v = (x.detach().double().requires_grad_() for x in (q_BSHD, k_BSGD, v_BSGD))
    queries = q.shape[1]
    keys, groups = k.shape[1:3]
    if visible_BSS is None:
        visible_BSS = torch.ones(queries, keys, dtype=torch.bool).tril()
    scores = torch.einsum("bqgnd,bkgd->bgnqk", q.unflatten(2, (groups, -1)), k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(visible_BSS[..., None, None, :, :].logical_not(), -torch.inf)
    out = torch.einsum("bgnqk,bkgd->bqgnd", scores.softmax(-1), v).flatten(2, 3)
    lse = scores.logsumexp(-1).flatten(1, 2)
    dlse_BHS = torch.zeros_like(lse) if dlse_BHS is None else dlse_BHS.double()
    gradients = torch.autograd.grad((out, lse), (q, k, v), (dout_BSHD.double(), dlse_BHS))
    return Attention(out.detach(), *gradients, lse.detach())
