"""Lengths: how the tokens of a sample are divided over the processes of a context group.

A sample of S tokens is divided into R ring shards of L tokens, a shard into U Ulysses parts of l
tokens, and with sequence_parallel each part over T tensor ranks between layers. All parts are
equal. Striped single tokens support any length: the last row is padded with tokens that are masked
out. Every other layout refuses a length that it cannot divide.
"""

import itertools
from typing import NamedTuple

from megatron_ring.config import Config
from megatron_ring.context_parallel.layout import (
    DocumentPlacement,
    Layout,
    auto_stripe_size,
    lengths_of_wide_stripes,
)
from megatron_ring.errors import counted, nearest_multiples
from megatron_ring.kernels.attention import stripe_widths
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.measured import MaskKind
from megatron_ring.parallel.grid import Grid

# What takes every length, because its samples are padded (``padded_length``).
_ANY_LENGTH = "--context-parallel striped with --stripe-size 1"


class ResolvedLayout(NamedTuple):
    """The layout of a run, and why --stripe-size auto has that size; "" where it has no choice."""

    layout: Layout
    stripe_reason: str


def layout(
    config: Config,
    grid: Grid,
    kernel: str,
    device: str,
    mask: MaskKind,
    machine: Machine | None = None,
) -> ResolvedLayout:
    """Return the layout of a run, with --stripe-size auto resolved for the attention kernel.

    The config must have no ``problems``. ``mask`` is the one by which the kernel was chosen,
    ``machine`` this one by default.
    """
    parallel = config.parallel
    length = padded_length(config, grid)
    placement = _placement(config, grid)
    if parallel.stripe_size != "auto":
        stripe_size = parallel.stripe_size
        fixed = Layout(parallel.context_parallel, length, grid.ring, stripe_size, placement)
        return ResolvedLayout(fixed, "")
    may_be_wide = (
        parallel.context_parallel == "striped" and parallel.context_parallel_reduction == "arrival"
    )
    if not may_be_wide:
        return ResolvedLayout(Layout(parallel.context_parallel, length, grid.ring), "")
    widths, reason = stripe_widths(kernel, device, mask, machine)
    is_packed = config.data.reset_attention_mask
    stripe_size = auto_stripe_size(length, grid.ring, widths, is_packed, config.model.window_size)
    if grid.ring == 1 and stripe_size == 1:
        reason = ""
    elif widths and stripe_size == 1:
        fitting = lengths_of_wide_stripes(length, grid.ring, widths, is_packed)
        sample = "packed samples" if is_packed else "samples"
        reason = (
            f"single tokens, because wider stripes, {reason}, need {sample} of {fitting} tokens on "
            f"{counted(grid.ring, 'ring rank')}, not {length}"
        )
    return ResolvedLayout(Layout("striped", length, grid.ring, stripe_size, placement), reason)


def _placement(config: Config, grid: Grid) -> DocumentPlacement | None:
    if config.parallel.document_placement == "spread" or grid.ring == 1:
        return None
    return DocumentPlacement(window=config.model.window_of_all_layers)


def padded_length(config: Config, grid: Grid) -> int:
    """Return seq_length, padded to equal parts for striped single tokens."""
    length = config.data.seq_length
    if not stripes_single_tokens(config):
        return length
    parts = grid.context * tensor_ranks_per_token_split(config, grid)
    return -(-length // parts) * parts


def stripes_single_tokens(config: Config) -> bool:
    """Return whether the layout is striped and may have a stripe size of 1."""
    parallel = config.parallel
    return parallel.context_parallel == "striped" and parallel.stripe_size in ("auto", 1)


def tensor_ranks_per_token_split(config: Config, grid: Grid) -> int:
    """Return how many tensor ranks split a process's tokens between layers.

    That is T with sequence_parallel, and 1 without.
    """
    return grid.tensor if config.parallel.sequence_parallel else 1


def problems(config: Config, grid: Grid) -> list[str]:
    """Return why a sample cannot be divided into equal parts."""
    parallel = config.parallel
    if config.data.seq_length < 1:
        return []  # reported by its section
    stripe_size = 1 if parallel.stripe_size == "auto" else parallel.stripe_size
    messages = _division_problems(config, grid, stripe_size)
    if stripe_size > 1 and parallel.context_parallel != "striped":
        messages.append(
            f"stripe_size {parallel.stripe_size} has no effect while context_parallel is "
            f"{parallel.context_parallel}. Set --stripe-size 1, or --context-parallel striped."
        )
    return messages


def _division_problems(config: Config, grid: Grid, stripe_size: int) -> list[str]:
    name = config.parallel.context_parallel
    length = padded_length(config, grid)
    tensor_ranks = tensor_ranks_per_token_split(config, grid)

    def layout_problems(length: int) -> list[str]:
        return Layout.problems(name, length, grid.ring, stripe_size, grid.ulysses)

    if tensor_ranks == 1:
        return [f"{problem} Any length: {_ANY_LENGTH}." for problem in layout_problems(length)]
    parts = grid.context * tensor_ranks
    multiple = next(
        candidate for candidate in itertools.count(parts, parts) if not layout_problems(candidate)
    )
    if length % multiple == 0:
        return []
    return [
        f"seq_length {length} must be a multiple of {multiple}: the {name} layout divides it into "
        f"{parts} equal parts ({grid.ring} ring x {grid.ulysses} Ulysses x {tensor_ranks} tensor "
        f"ranks, by sequence_parallel). Nearest: {nearest_multiples(length, multiple)}. Set "
        f"--seq-length, or leave out --sequence-parallel. Any length: {_ANY_LENGTH}."
    ]
