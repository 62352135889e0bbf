"""Lengths: a sample is laid out on the ring and shared out, down to the tokens of one process.

S tokens make R ring shards of L, a shard U runs of l, and under ``sequence_parallel`` T tensor ranks share out each run
between their layers. All parts are equal. Single striped tokens are dealt out whatever their number: what is missing
from their last row is filled with tokens that count for nothing. Every other layout refuses what it cannot divide.
"""

import itertools

from megatron_ring.config import Config
from megatron_ring.context_parallel.layout import Layout, auto_stripe_size
from megatron_ring.errors import nearest_multiples
from megatron_ring.kernels.attention import stripe_widths
from megatron_ring.parallel.grid import Grid


def layout(config: Config, grid: Grid, kernel: str, device: str) -> Layout:
    """The layout of a run whose lengths have no ``problems``, with --stripe-size auto settled for the kernel."""
    parallel, length = config.parallel, laid_out_length(config, grid)
    stripe_size = parallel.stripe_size
    if stripe_size == "auto":
        wide = (
            parallel.context_parallel == "striped"
            and parallel.context_parallel_reduction == "arrival"
        )
        widths = stripe_widths(kernel, device) if wide else ()
        packed, window = config.data.reset_attention_mask, config.model.window_size
        stripe_size = auto_stripe_size(length, grid.ring, widths, packed, window)
    return Layout(parallel.context_parallel, length, grid.ring, stripe_size)


def laid_out_length(config: Config, grid: Grid) -> int:
    """seq_length, filled up to equal parts where single tokens are striped."""
    parts = grid.context * tokens_are_shared_by(config, grid)
    single_tokens = (
        config.parallel.context_parallel == "striped" and config.parallel.stripe_size in ("auto", 1)
    )
    return -(-config.data.seq_length // parts) * parts if single_tokens else config.data.seq_length


def tokens_are_shared_by(config: Config, grid: Grid) -> int:
    """The tensor ranks that split a process's tokens l between their layers: T, or 1 without sequence_parallel."""
    return grid.tensor if config.parallel.sequence_parallel else 1


def problems(config: Config, grid: Grid) -> list[str]:
    """Why a sample cannot be cut into equal parts."""
    parallel = config.parallel
    stripe_size = 1 if parallel.stripe_size == "auto" else parallel.stripe_size
    if config.data.seq_length < 1:
        return []  # its section has said so
    found = _division_problems(config, grid, stripe_size)
    if stripe_size > 1 and parallel.context_parallel != "striped":
        found.append(
            f"stripe_size {parallel.stripe_size} has no effect while context_parallel is {parallel.context_parallel}. "
            "Set --stripe-size 1, or --context-parallel striped."
        )
    return found


def _division_problems(config: Config, grid: Grid, stripe_size: int) -> list[str]:
    name, length, sharing = (
        config.parallel.context_parallel,
        laid_out_length(config, grid),
        tokens_are_shared_by(config, grid),
    )
    if sharing == 1:
        return Layout.problems(name, length, grid.ring, stripe_size, grid.ulysses)
    parts = grid.context * sharing
    multiple = next(
        shortest
        for shortest in itertools.count(parts, parts)
        if not Layout.problems(name, shortest, grid.ring, stripe_size, grid.ulysses)
    )
    if length % multiple == 0:
        return []
    return [
        f"seq_length {length} cannot be cut into {parts} equal parts ({grid.ring} ring x {grid.ulysses} Ulysses x "
        f"{sharing} tensor ranks, by sequence_parallel) and laid out {name}: it must be a multiple of {multiple}. "
        f"Nearest: {nearest_multiples(length, multiple)}. Set --seq-length, use --context-parallel striped with "
        "--stripe-size 1, which takes any length, or leave --sequence-parallel out."
    ]
