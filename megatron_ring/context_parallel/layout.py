"""Layouts: which process owns which token. ``Layout.positions`` defines it.

Only a sample whose documents are placed by size has positions of its own (placement.py).

The loader shards by it, RoPE gets it as a tensor, masks and the planner are derived from it, and
the tests rebuild the full mask from it. This module neither communicates nor computes attention.

- ``ring``: contiguous shards (Liu, Zaharia and Abbeel 2023, Ring Attention, section 3). Under a
  causal mask rank 0 idles while rank R-1 works in every hop.
- ``striped``: stripes of tokens are assigned to the ranks in turn (Brandon et al. 2023, Striped
  Attention, section 3), so that every rank has the same work in every hop. Stripes of
  ``stripe_size`` tokens are assigned in alternating direction, so that no rank always has the later
  one; single tokens always in the same direction, as in the paper, which keeps every hop one
  triangle (docs/decisions/0005).
- ``zigzag``: rank r owns chunks r and 2R-1-r of 2R, pairing an early chunk with a late one.

If a ring rank is a group of Ulysses ranks, each of them holds a contiguous part of its shard.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_ring.context_parallel.sample_blocks import BLOCK
from megatron_ring.errors import ConfigError, counted, nearest_multiples
from megatron_ring.kernels.attention.measured import WIDEST, StripeSize

Positions = Callable[["Layout", int], torch.Tensor]


def _contiguous(layout: "Layout", ring_rank: int) -> torch.Tensor:
    return ring_rank * layout.shard_length + torch.arange(layout.shard_length)


def _striped(layout: "Layout", ring_rank: int) -> torch.Tensor:
    stripe = layout.stripe_size
    i = torch.arange(layout.shard_length)
    round_number = i // stripe
    is_reversed = (round_number % 2 == 1) if stripe > 1 else torch.zeros_like(i, dtype=torch.bool)
    turn = torch.where(is_reversed, layout.ring_size - 1 - ring_rank, ring_rank)
    return (round_number * layout.ring_size + turn) * stripe + i % stripe


def _zigzag(layout: "Layout", ring_rank: int) -> torch.Tensor:
    chunk = torch.arange(layout.shard_length // 2)
    early = ring_rank
    late = 2 * layout.ring_size - 1 - ring_rank
    return torch.cat([early * len(chunk) + chunk, late * len(chunk) + chunk])


class _Rules(NamedTuple):
    """What distinguishes one layout.

    Attributes:
        positions: implements ``Layout.positions`` for a ring rank.
        multiple_of: (ring size, stripe size) -> what seq_length must be a multiple of.
        rule: ``multiple_of`` in words, for error messages.
    """

    positions: Positions
    multiple_of: Callable[[int, int], int]
    rule: str


_CONTIGUOUS = _Rules(
    positions=_contiguous,
    multiple_of=lambda ring_size, stripe: ring_size,
    rule="ring size",
)
_LAYOUTS: dict[str, _Rules] = {
    "none": _CONTIGUOUS,
    "ring": _CONTIGUOUS,
    "striped": _Rules(
        positions=_striped,
        multiple_of=lambda ring_size, stripe: ring_size * stripe,
        rule="ring size x stripe size",
    ),
    "zigzag": _Rules(
        positions=_zigzag,
        multiple_of=lambda ring_size, stripe: 2 * ring_size,
        rule="2 x ring size",
    ),
}

NAMES = tuple(_LAYOUTS)


@dataclass(frozen=True)
class DocumentPlacement:
    """The parameters of placing the documents of each sample by size (placement.py).

    Attributes:
        window: number of keys that a token sees in every layer; 0 if not all layers have the same.
        block: ranks own whole blocks of so many tokens.
    """

    window: int = 0
    block: int = BLOCK


@dataclass(frozen=True)
class Layout:
    """How the ``seq_length`` tokens of a sample are distributed over a ring of ``ring_size`` ranks.

    Raises ConfigError if the layout does not allow that length; ``problems`` returns the reasons
    without raising.

    With ``placement``, a sample of several documents may have positions of its own
    (placement.py); ``positions`` are those of all other samples.
    """

    name: str
    seq_length: int
    ring_size: int
    stripe_size: int = 1
    placement: DocumentPlacement | None = None

    def __post_init__(self):
        if problems := self.problems(self.name, self.seq_length, self.ring_size, self.stripe_size):
            raise ConfigError(problems)

    @staticmethod
    def of_at_least(tokens: int, name: str, ring_size: int, stripe_size: int = 1) -> "Layout":
        """Return the layout of the shortest legal length of at least ``tokens``, and at least 1."""
        multiple = _multiple(name, ring_size, stripe_size)
        return Layout(name, max(1, -(-tokens // multiple)) * multiple, ring_size, stripe_size)

    @property
    def shard_length(self) -> int:
        """L, the number of tokens that each ring rank owns."""
        return self.seq_length // self.ring_size

    def positions(
        self, ring_rank: int, ulysses_rank: int = 0, ulysses_size: int = 1
    ) -> torch.Tensor:
        """Return the positions in the sample of a process's tokens: (l,) int64, increasing.

        Ulysses rank u of U holds the u-th of U equal contiguous parts of the shard of
        ``ring_rank``; the default is the whole shard, (L,).
        """
        assert 0 <= ring_rank < self.ring_size
        assert 0 <= ulysses_rank < ulysses_size
        assert self.shard_length % ulysses_size == 0
        return _LAYOUTS[self.name].positions(self, ring_rank).chunk(ulysses_size)[ulysses_rank]

    @staticmethod
    def problems(
        name: str, seq_length: int, ring_size: int, stripe_size: int = 1, ulysses_size: int = 1
    ) -> list[str]:
        """Return why these numbers make no layout: each rule, nearest legal values and flag."""
        if name not in _LAYOUTS:
            return [
                f"context_parallel {name!r} is not a layout. Known: {', '.join(NAMES)}. "
                "Set --context-parallel."
            ]
        if ring_size < 1:
            return [f"a ring of {ring_size} ranks cannot hold a sequence; the smallest has 1."]
        if stripe_size < 1:
            return [f"stripe_size {stripe_size} must be at least 1. Set --stripe-size."]
        if name == "none" and ring_size > 1:
            return [
                f"context_parallel none keeps whole sequences, but the ring has {ring_size} ranks. "
                "Set --context-parallel striped (or ring, zigzag), or --context-parallel-size 1."
            ]
        return _length_problems(name, seq_length, ring_size, stripe_size, ulysses_size)


def _multiple(name: str, ring_size: int, stripe_size: int, ulysses_size: int = 1) -> int:
    """Return what the length of a sample must be a multiple of."""
    return math.lcm(_LAYOUTS[name].multiple_of(ring_size, stripe_size), ring_size * ulysses_size)


def _length_problems(
    name: str, seq_length: int, ring_size: int, stripe_size: int, ulysses_size: int
) -> list[str]:
    rule = _LAYOUTS[name].rule
    multiple = _multiple(name, ring_size, stripe_size, ulysses_size)
    if seq_length > 0 and seq_length % multiple == 0:
        return []
    ranks = counted(ring_size, "ring rank")
    if ulysses_size > 1:
        ranks += f" of {ulysses_size} Ulysses ranks"
        rule += ", and ring size x Ulysses degree"
    return [
        f"seq_length {seq_length} cannot be laid out {name} on {ranks}: it must be a multiple of "
        f"{multiple} ({rule}). Nearest: {nearest_multiples(seq_length, multiple)}. "
        "Set --seq-length."
    ]


# Packed documents balance over wide stripes only on average, so they need many short rounds.
# Both numbers are measured in docs/log.md.
_MIN_ROUNDS_OF_PACKED = 32
_MAX_ROUND_TOKENS_OF_PACKED = 2048


def auto_stripe_size(
    seq_length: int, ring_size: int, widths: Sequence[StripeSize], packed: bool, window: int = 0
) -> int:
    """Return what --stripe-size auto means: the widest of the kernel's ``widths`` that fits.

    WIDEST is two stripes per rank, which are the chunks of the zigzag layout. A width fits if it
    balances the work, with as many rounds in one direction as in the other. ``packed`` documents
    also need many rounds, and short ones unless no width is that narrow. A ``window`` should span
    two rounds; if no width is that narrow, the narrowest is the least unbalanced. Returns 1 if no
    width fits.
    """
    # The order of a ring of one does not depend on its stripes.
    zigzag_chunk = max(1, seq_length // (2 * ring_size)) if ring_size > 1 else 1
    in_tokens = [zigzag_chunk if width == WIDEST else width for width in widths]
    even = [width for width in in_tokens if seq_length % (2 * ring_size * width) == 0]
    if packed:
        most = seq_length // (ring_size * _MIN_ROUNDS_OF_PACKED)
        in_many_rounds = [width for width in even if width <= most]
        return _widest(in_many_rounds, at_most=_MAX_ROUND_TOKENS_OF_PACKED // ring_size)
    return _widest(even, at_most=window // (2 * ring_size) if window else seq_length)


def lengths_of_wide_stripes(
    seq_length: int, ring_size: int, widths: Sequence[StripeSize], packed: bool
) -> str:
    """Describe the lengths that the narrowest of ``widths`` fits, where none fits this one.

    >>> lengths_of_wide_stripes(64, 2, [256, 128], packed=False)
    'a multiple of 512'
    """
    # Two stripes per rank, the widest, are of any width.
    width = min(1 if width == WIDEST else width for width in widths)
    both_directions = 2 * ring_size * width
    if packed and seq_length % both_directions == 0:
        return f"at least {ring_size * _MIN_ROUNDS_OF_PACKED * width}"
    return f"a multiple of {both_directions}"


def _widest(widths: Sequence[int], at_most: int) -> int:
    """Return the widest up to ``at_most``, else the narrowest of all, else 1."""
    return max((width for width in widths if width <= at_most), default=min(widths, default=1))
