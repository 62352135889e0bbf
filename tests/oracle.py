"""The oracle: attention over the whole sequence in plain torch and float64, its gradients by autograd.

Written from softmax(q k^T / sqrt(D)) v alone and sharing no line with the package, so that both cannot be wrong alike.
The masks are written from what they mean: which document a token is of, and how far back another token is.
"""

import itertools
from collections.abc import Sequence
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
    batch: int,
    tokens: int,
    heads: int,
    groups: int,
    dtype: torch.dtype = torch.float64,
    head_size: int = 16,
) -> list[torch.Tensor]:
    """Standard normal q, k, v and gradient of the output; the same for the same arguments, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(1000 * tokens + heads + groups)
    shapes = [(batch, tokens, each, head_size) for each in (heads, groups, groups, heads)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def random_dlse(q_BSHD: torch.Tensor) -> torch.Tensor:
    """Standard normal gradient of the log-sum-exp, (B, H, S), for such queries, in float32 (float64 for float64)."""
    batch, tokens, heads, _ = q_BSHD.shape
    generator = torch.Generator().manual_seed(tokens)
    dlse_BHS = torch.randn(batch, heads, tokens, generator=generator, dtype=torch.float64)
    return dlse_BHS.to(torch.promote_types(q_BSHD.dtype, torch.float32))


def documents(samples: int, tokens: int, lengths: Sequence[int]) -> torch.Tensor:
    """document_BS, the document of each token: these lengths over and over, through samples laid end to end."""
    repeated = (
        itertools.repeat(number, length) for number, length in enumerate(itertools.cycle(lengths))
    )
    numbers = itertools.islice(itertools.chain.from_iterable(repeated), samples * tokens)
    return torch.tensor(list(numbers)).view(samples, tokens)


def document_starts(document_BS: torch.Tensor) -> torch.Tensor:
    """Where documents begin in the samples laid end to end; each sample begins one, if only the rest of one."""
    begins_BS = torch.ones_like(document_BS, dtype=torch.bool)
    begins_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    return begins_BS.flatten().nonzero().flatten()


def visible(document_BS: torch.Tensor, window: int = 0) -> torch.Tensor:
    """visible_BSS[sample, query, key]: of one document, not ahead, less than ``window`` tokens back unless it is 0."""
    p = torch.arange(document_BS.shape[1])
    back_SS = p[:, None] - p
    near_SS = (back_SS >= 0) & (back_SS < (window or len(p)))
    return (document_BS[:, :, None] == document_BS[:, None, :]) & near_SS


def attention(
    q_BSHD: torch.Tensor,
    k_BSGD: torch.Tensor,
    v_BSGD: torch.Tensor,
    dout_BSHD: torch.Tensor,
    visible_BSS: torch.Tensor | None = None,
    dlse_BHS: torch.Tensor | None = None,
) -> Attention:
    """Query head i reads key-value head i // (H / G). ``visible_BSS[..., query, key]``, or one (S, S) for all samples,
    is causal unless given; ``dlse_BHS``, the gradient of the log-sum-exp, is 0 unless given."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q_BSHD, k_BSGD, v_BSGD))
    queries, keys, groups = q.shape[1], k.shape[1], k.shape[2]
    if visible_BSS is None:
        visible_BSS = torch.ones(queries, keys, dtype=torch.bool).tril()
    scores = torch.einsum("bqgnd,bkgd->bgnqk", q.unflatten(2, (groups, -1)), k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(visible_BSS[..., None, None, :, :].logical_not(), -torch.inf)
    out = torch.einsum("bgnqk,bkgd->bqgnd", scores.softmax(-1), v).flatten(2, 3)
    lse = scores.logsumexp(-1).flatten(1, 2)
    dlse_BHS = torch.zeros_like(lse) if dlse_BHS is None else dlse_BHS.double()
    gradients = torch.autograd.grad((out, lse), (q, k, v), (dout_BSHD.double(), dlse_BHS))
    return Attention(out.detach(), *gradients, lse.detach())
