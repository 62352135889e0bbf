"""Validation that ranks attend together as one would alone: random data, compared with plain torch in float64.

The sample is short and drawn alike on every rank; layout, groups, kernel, type, heads, windows and documents are the
run's own. Stripes are narrower where a short sample would not have enough of them.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.invariant import BLOCKS
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.errors import ConfigError
from megatron_ring.kernels.attention.accuracy import TOLERANCE, error
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.grid import Coordinates
from megatron_ring.parallel.process_id import Process, in_words
from megatron_ring.plan.parameters import share
from megatron_ring.settings.setup import Setup

# The tolerances are for up to four query heads that read one key-value head.
_READERS = 4
_TOKENS = 256


class Errors(NamedTuple):
    """How far each is from what one process would get, as ``accuracy.error`` measures it."""

    out: float
    dq: float
    dk: float
    dv: float


def check_attention(
    setup: Setup, groups: ProcessGroups, processes: list[Process], consensus: Consensus
) -> Errors:
    """The largest errors of any rank. Raises ConfigError on every rank where they are beyond what is allowed.

    Talks on the ring's links and in the Ulysses group; blocks until all have compared.
    """
    at = setup.grid.coordinates(consensus.rank)
    of_ranks = Errors(*zip(*consensus.gather(lambda: errors(setup, groups, at))))
    if problems := list(_problems(of_ranks, setup, processes)):
        raise ConfigError(
            [
                *problems,
                "Set --attention-kernel reference: if that is right, the kernel is not, else a host.",
            ]
        )
    return Errors(*map(max, of_ranks))


def allowed(setup: Setup) -> Errors:
    """The largest errors that are no fault. Keys' gradients add up, rounded as often, over the heads that read them."""
    model, tolerance = setup.config.model, TOLERANCE[setup.precision.dtype]
    readers = model.num_attention_heads / model.key_value_heads
    of_keys = tolerance * max(1, readers / _READERS) ** 0.5
    return Errors(tolerance, tolerance, of_keys, of_keys)


def _problems(of_ranks: Errors, setup: Setup, processes: list[Process]) -> Iterator[str]:
    for name, found, limit in zip(Errors._fields, of_ranks, allowed(setup)):
        wrong = [
            process for process, off in zip(processes, found) if not off <= limit
        ]  # nan is not
        if wrong:
            yield (
                f"ring attention is not local attention: {name} is wrong on {in_words(wrong)}, by "
                f"{max(found[process.global_rank] for process in wrong):.1e} where "
                f"{setup.precision.name} allows {limit:.1e} (kernel {setup.kernel.name})."
            )


def errors(setup: Setup, groups: ProcessGroups, at: Coordinates) -> Errors:
    """Those of this rank's tokens, the largest over the windows that the model's layers have. Collective."""
    model, grid = setup.config.model, setup.grid
    layout = _short(setup.layout, grid.ulysses)
    reduction = setup.config.parallel.context_parallel_reduction
    attend = ContextParallelAttention(layout, setup.kernel.name, groups, reduction=reduction)
    positions = layout.positions(at.ring, at.ulysses, grid.ulysses)
    windows = {
        min(model.window_of(layer), layout.seq_length // 4) for layer in range(model.num_layers)
    }
    documents = (
        [0, layout.seq_length // 3, layout.seq_length // 2]
        if setup.config.data.reset_attention_mask
        else [0]
    )
    found = []
    for window in sorted(windows):
        tensors = _random_inputs(setup, layout.seq_length)
        local = [x[:, positions].requires_grad_() for x in tensors]
        starts = torch.tensor(documents) if len(documents) > 1 else None
        out_BlHD, _ = attend(*local[:3], window, starts)
        ours = Attended(out_BlHD, *torch.autograd.grad(out_BlHD, local[:3], local[3]))
        expected = plain_attention(*tensors, window, documents)
        found.append([error(a, b[:, positions]) for a, b in zip(ours, expected)])
    return Errors(*(max(values) for values in zip(*found)))


def _short(layout: Layout, ulysses: int) -> Layout:
    """The layout of some 256 tokens, or of as many as give each process a stripe forth and one back."""
    stripe = max(1, min(layout.stripe_size, _TOKENS // (2 * layout.ring_size * ulysses)))
    unit = math.lcm(2 * layout.ring_size * ulysses * stripe, BLOCKS)
    return Layout(layout.name, -(-_TOKENS // unit) * unit, layout.ring_size, stripe)


def _random_inputs(setup: Setup, tokens: int) -> list[torch.Tensor]:
    """Standard normal q, k, v and gradient of the output of a whole sample, with a tensor rank's heads."""
    model, ranks = setup.config.model, setup.grid.tensor
    heads, groups = share(model.num_attention_heads, ranks), share(model.key_value_heads, ranks)
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, tokens, each, model.head_dim) for each in (heads, groups, groups, heads)]
    return [
        torch.randn(s, generator=generator).to(setup.device, setup.precision.dtype) for s in shapes
    ]


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
