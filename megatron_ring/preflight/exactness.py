"""Checks that attention over all ranks gives the same as plain attention on one, on random data.

The sample is short and drawn identically on every rank. Layout, groups, kernel, dtype, heads,
windows and documents are the run's own; stripes are narrower where a short sample would not have
enough of them. The operator is the one that the model calls, so kernels get what they get in
training: halves of heads, received keys or queries, two samples if a micro-batch has several, and
a gradient of the log-sum-exp if there are attention sinks. The reference is plain torch in float64
over the whole sample. It shares no code with the kernels, the masks and the ring, so that the same
bug cannot be in both.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.invariant import BLOCKS
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.placement import place_samples, placed_positions
from megatron_ring.errors import ConfigError
from megatron_ring.kernels.attention.accuracy import TOLERANCE, error
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.grid import Coordinates
from megatron_ring.parallel.process_id import ProcessId, describe_processes
from megatron_ring.plan.parameters import share
from megatron_ring.settings.run_settings import RunSettings

# TOLERANCE holds for up to four query heads for each key-value head.
_QUERY_HEADS_OF_TOLERANCE = 4
_SAMPLE_TOKENS = 256
_BLOCKS_OF_RANK = 8  # of a ring rank, if documents are placed


class AttentionResult(NamedTuple):
    """The output of attention and its gradients: (batch, tokens, heads, head dim) each."""

    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


class Sample(NamedTuple):
    """Inputs of attention and gradients of its results, for whole samples.

    dlse_BHS: None if no gradient reaches the log-sum-exp.
    """

    q_BSHD: torch.Tensor
    k_BSGD: torch.Tensor
    v_BSGD: torch.Tensor
    dout_BSHD: torch.Tensor
    dlse_BHS: torch.Tensor | None = None


class Errors(NamedTuple):
    """The error of the output and of each gradient, as ``accuracy.error`` defines it."""

    out: float
    dq: float
    dk: float
    dv: float


def check_attention(
    setup: RunSettings, groups: ProcessGroups, processes: list[ProcessId], consensus: Consensus
) -> Errors:
    """Return the largest errors of any rank; raise ConfigError on all if one is above its limit.

    Communicates on the ring's links and in the Ulysses group; blocks until all ranks have compared.
    """
    coordinates = setup.grid.coordinates(consensus.rank)
    of_ranks = consensus.gather(lambda: errors(setup, groups, coordinates))
    by_tensor = Errors(*zip(*of_ranks))
    problems = list(_problems(by_tensor, setup, processes))
    if problems:
        advice = (
            "Set --attention-kernel reference. If that passes, the kernel is wrong; if not, a host."
        )
        raise ConfigError([*problems, advice])
    return Errors(*map(max, by_tensor))


def error_limits(setup: RunSettings) -> Errors:
    """Return the largest errors that rounding explains.

    Gradients of keys and values add up over the query heads that share them, each rounded.
    """
    model = setup.config.model
    tolerance = TOLERANCE[setup.precision.dtype]
    queries_per_key = model.num_attention_heads / model.key_value_heads
    of_keys = tolerance * max(1, queries_per_key / _QUERY_HEADS_OF_TOLERANCE) ** 0.5
    return Errors(out=tolerance, dq=tolerance, dk=of_keys, dv=of_keys)


def _problems(by_tensor: Errors, setup: RunSettings, processes: list[ProcessId]) -> Iterator[str]:
    for name, of_ranks, limit in zip(Errors._fields, by_tensor, error_limits(setup)):
        # Not "error > limit", which is False for nan.
        wrong = [process for process, found in zip(processes, of_ranks) if not found <= limit]
        if wrong:
            largest = max(of_ranks[process.global_rank] for process in wrong)
            yield (
                f"ring attention is not local attention: {name} is wrong on "
                f"{describe_processes(wrong)}, by "
                f"{largest:.1e} where {setup.precision.name} allows {limit:.1e} (kernel "
                f"{setup.kernel.name})."
            )


def errors(setup: RunSettings, groups: ProcessGroups, coordinates: Coordinates) -> Errors:
    """Return the errors of this rank's tokens, the largest over the model's windows. Collective."""
    grid = setup.grid
    layout = _short_layout(setup.layout, grid.ulysses)
    attention = ContextParallelAttention(
        layout,
        setup.kernel.name,
        groups,
        reduction=setup.config.parallel.context_parallel_reduction,
    )
    documents = _document_starts(setup, layout)
    sample = _random_sample(setup, layout.seq_length)
    starts = None
    positions = layout.positions(coordinates.ring, coordinates.ulysses, grid.ulysses)
    if len(documents) > 1:
        offsets = layout.seq_length * torch.arange(len(sample.q_BSHD))
        starts = (offsets.unsqueeze(1) + torch.tensor(documents)).flatten()
        if placements := place_samples(starts, len(sample.q_BSHD), layout):
            # All samples have the same documents, and so the same placement.
            process = coordinates.ring, coordinates.ulysses, grid.ulysses
            positions = placed_positions(layout, placements, *process)[0]
    of_windows = []
    for window in _windows(setup, layout.seq_length):
        q, k, v, dout = (tensor[:, positions] for tensor in sample[:4])
        inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
        results = attention(*inputs, window, starts)
        dresults = [dout]
        if sample.dlse_BHS is not None:
            dresults.append(sample.dlse_BHS[:, :, positions])
        gradients = torch.autograd.grad(results[: len(dresults)], inputs, dresults)
        actual = AttentionResult(results[0], *gradients)
        expected = plain_attention(sample, window, documents)
        of_windows.append([error(a, b[:, positions]) for a, b in zip(actual, expected)])
    return Errors(*map(max, zip(*of_windows)))


def _windows(setup: RunSettings, seq_length: int) -> list[int]:
    """Return the windows of the model's layers, shortened to a quarter of the sample."""
    model = setup.config.model
    windows = {min(model.window_of(layer), seq_length // 4) for layer in range(model.num_layers)}
    return sorted(windows)


def _document_starts(setup: RunSettings, layout: Layout) -> list[int]:
    if not setup.config.data.reset_attention_mask:
        return [0]
    half = layout.seq_length // 2
    if layout.placement:  # A long document, and some that are short enough to stay whole.
        return [0, *range(half, layout.seq_length, max(1, layout.shard_length // 4))]
    return [0, layout.seq_length // 3, half]


def _short_layout(layout: Layout, ulysses: int) -> Layout:
    """Return ``layout`` for about 256 tokens, or more where each process needs two stripes.

    Stripes are assigned to ranks in both directions in turn, so a process has one of each.
    """
    stripe = max(1, min(layout.stripe_size, _SAMPLE_TOKENS // (2 * layout.ring_size * ulysses)))
    unit = math.lcm(2 * layout.ring_size * ulysses * stripe, BLOCKS)
    seq_length = -(-_SAMPLE_TOKENS // unit) * unit
    placement = layout.placement
    if placement:  # Blocks as short as lets each rank have several.
        block = max(1, seq_length // (layout.ring_size * _BLOCKS_OF_RANK))
        placement = replace(placement, window=min(placement.window, seq_length // 4), block=block)
    return Layout(layout.name, seq_length, layout.ring_size, stripe, placement)


def _random_sample(setup: RunSettings, tokens: int) -> Sample:
    """Return standard normal tensors with a tensor rank's heads, for at most two samples."""
    model = setup.config.model
    query_heads = share(model.num_attention_heads, setup.grid.tensor)
    key_value_heads = share(model.key_value_heads, setup.grid.tensor)
    samples = min(2, setup.config.training.micro_batch_size)
    generator = torch.Generator().manual_seed(tokens)
    tensors = []
    for heads in (query_heads, key_value_heads, key_value_heads, query_heads):
        tensor = torch.randn((samples, tokens, heads, model.head_dim), generator=generator)
        tensors.append(tensor.to(setup.device, setup.precision.dtype))
    if model.softmax_type == "vanilla":
        return Sample(*tensors)
    dlse_BHS = torch.randn((samples, query_heads, tokens), generator=generator)
    return Sample(*tensors, dlse_BHS.to(setup.device))


def plain_attention(sample: Sample, window: int, documents: list[int]) -> AttentionResult:
    """Compute softmax(q k^T / sqrt(D)) v over whole samples in float64, gradients by autograd.

    ``documents``: the positions of each sample at which documents start.
    """
    q, k, v = (x.detach().double().requires_grad_() for x in sample[:3])
    queries_per_key = q.shape[2] // k.shape[2]
    k_BSHD = k.repeat_interleave(queries_per_key, dim=2)
    v_BSHD = v.repeat_interleave(queries_per_key, dim=2)
    scores_BHSS = torch.einsum("bqhd,bkhd->bhqk", q, k_BSHD) * q.shape[-1] ** -0.5
    visible_SS = _visible(q.shape[1], window, documents).to(q.device)
    scores_BHSS = scores_BHSS.masked_fill(~visible_SS, -torch.inf)
    out_BSHD = torch.einsum("bhqk,bkhd->bqhd", scores_BHSS.softmax(-1), v_BSHD)
    results = [(out_BSHD, sample.dout_BSHD)]
    if sample.dlse_BHS is not None:
        results.append((scores_BHSS.logsumexp(-1), sample.dlse_BHS))
    outputs, doutputs = zip(*results)
    gradients = torch.autograd.grad(outputs, (q, k, v), [x.double() for x in doutputs])
    return AttentionResult(out_BSHD, *gradients)


def _visible(tokens: int, window: int, documents: list[int]) -> torch.Tensor:
    """(query, key) bool: causal, within the window if there is one, and of the same document."""
    positions = torch.arange(tokens)
    document = torch.searchsorted(torch.tensor(documents), positions, right=True)
    distance = positions[:, None] - positions
    is_same_document = document[:, None] == document
    return (distance >= 0) & (distance < (window or tokens)) & is_same_document
