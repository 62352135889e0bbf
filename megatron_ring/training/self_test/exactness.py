"""Proof that ranks attend together as one would alone: random data, compared with plain torch in float64.

The sample is short and drawn alike on every rank; layout, groups, kernel, type, heads, windows and documents are the
run's own. Stripes are narrower where a short sample would not have enough of them.
"""

from typing import NamedTuple

import torch

from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.errors import ConfigError
from megatron_ring.parallel.agreement import Agreement
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.grid import Coordinates
from megatron_ring.plan.parameters import share
from megatron_ring.training.self_test.processes import Process, in_words
from megatron_ring.training.setup import Setup

# Largest difference over the largest entry. The worst that 1,800 rings showed is a third to a half of these.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2.5e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}
_TOKENS = 256


class Attended(NamedTuple):
    """What attention gives, and its gradients, as (batch, tokens, heads, head size)."""

    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


class Errors(NamedTuple):
    """How far each is from what one process would get: largest difference over the largest entry, or over 1."""

    out: float
    dq: float
    dk: float
    dv: float


def check_attention(setup: Setup, groups: ProcessGroups, processes: list[Process], agreement: Agreement) -> Errors:
    """The largest errors of any rank. Raises ConfigError on every rank where they are beyond the type's tolerance.

    Talks on the ring's links and in the Ulysses group; blocks until all have compared.
    """
    at = setup.grid.coordinates(agreement.rank)
    found = agreement.on_all(lambda: errors(setup, groups, at))
    allowed = TOLERANCE[setup.precision.dtype]
    problems = []
    for name in Errors._fields:
        # nan is within no tolerance
        wrong = [process for process, error in zip(processes, found) if not getattr(error, name) <= allowed]
        if wrong:
            worst = max(getattr(found[process.global_rank], name) for process in wrong)
            problems.append(
                f"ring attention is not local attention: {name} is wrong on {in_words(wrong)}, by {worst:.1e} of its "
                f"largest entry where {setup.precision.name} allows {allowed:.1e} (kernel {setup.kernel.name})."
            )
    if problems:
        raise ConfigError(
            [*problems, "Set --attention-kernel reference: if that is right, the kernel is not, else a host."]
        )
    return Errors(*(max(values) for values in zip(*found)))


def errors(setup: Setup, groups: ProcessGroups, at: Coordinates) -> Errors:
    """Those of this rank's tokens, the largest over the windows that the model's layers have. Collective."""
    model, grid = setup.config.model, setup.grid
    layout = _short(setup.layout, grid.ulysses)
    attend = ContextParallelAttention(layout, setup.kernel.name, groups)
    positions = layout.positions(at.ring, at.ulysses, grid.ulysses)
    windows = {min(model.window_of(layer), layout.seq_length // 4) for layer in range(model.num_layers)}
    documents = [0, layout.seq_length // 3, layout.seq_length // 2] if setup.config.data.reset_attention_mask else [0]
    found = []
    for window in sorted(windows):
        tensors = _random_inputs(setup, layout.seq_length)
        local = [x[:, positions].requires_grad_() for x in tensors]
        starts = torch.tensor(documents) if len(documents) > 1 else None
        out_BlHD, _ = attend(*local[:3], window, starts)
        ours = Attended(out_BlHD, *torch.autograd.grad(out_BlHD, local[:3], local[3]))
        expected = plain_attention(*tensors, window, documents)
        found.append([_error(a, b[:, positions]) for a, b in zip(ours, expected)])
    return Errors(*(max(values) for values in zip(*found)))


def _short(layout: Layout, ulysses: int) -> Layout:
    """The layout of some 256 tokens, or of as many as give each process a stripe forth and one back."""
    stripe = max(1, min(layout.stripe_size, _TOKENS // (2 * layout.ring_size * ulysses)))
    unit = 2 * layout.ring_size * ulysses * stripe
    return Layout(layout.name, -(-_TOKENS // unit) * unit, layout.ring_size, stripe)


def _random_inputs(setup: Setup, tokens: int) -> list[torch.Tensor]:
    """Standard normal q, k, v and gradient of the output of a whole sample, with a tensor rank's heads."""
    model, ranks = setup.config.model, setup.grid.tensor
    heads, groups = share(model.num_attention_heads, ranks), share(model.key_value_heads, ranks)
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, tokens, each, model.head_dim) for each in (heads, groups, groups, heads)]
    return [torch.randn(s, generator=generator).to(setup.device, setup.precision.dtype) for s in shapes]


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


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
