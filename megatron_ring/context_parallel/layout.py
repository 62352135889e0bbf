"""Layouts: which process owns which token. ``Layout.positions`` is the only statement of it in the tree.

The loader shards with it, RoPE receives it as a tensor, the masks and the planner count from it, and the tests
rebuild the full mask from it. Nothing here knows torch.distributed, and nothing here computes attention.

- ``ring``: contiguous shards (Liu, Zaharia and Abbeel 2023, Ring Attention, section 3). Under a causal mask rank 0
  idles while rank R-1 works in every hop.
- ``striped``: tokens dealt out like cards (Brandon et al. 2023, Striped Attention, section 3), so that every rank has
  the same work in every hop. Stripes of ``stripe_size`` tokens are dealt forth and back, so that no rank has always the
  later one; single tokens as in the paper, which keeps every hop one triangle (docs/decisions/0005).
- ``zigzag``: rank r owns chunks r and 2R-1-r of 2R, pairing an early chunk with a late one.

Where a ring rank is several processes, its Ulysses members, each holds a run of its shard.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_ring.errors import ConfigError, nearest_multiples

Positions = Callable[["Layout", int], torch.Tensor]


def _contiguous(layout: "Layout", ring_rank: int) -> torch.Tensor:
    return ring_rank * layout.shard_length + torch.arange(layout.shard_length)


def _striped(layout: "Layout", ring_rank: int) -> torch.Tensor:
    stripe, i = layout.stripe_size, torch.arange(layout.shard_length)
    dealt = i // stripe
    back = dealt % 2 == 1 if stripe > 1 else torch.zeros_like(dealt, dtype=torch.bool)
    place = torch.where(back, layout.ring_size - 1 - ring_rank, ring_rank)
    return (dealt * layout.ring_size + place) * stripe + i % stripe


def _zigzag(layout: "Layout", ring_rank: int) -> torch.Tensor:
    chunk = torch.arange(layout.shard_length // 2)
    early, late = ring_rank, 2 * layout.ring_size - 1 - ring_rank
    return torch.cat([early * len(chunk) + chunk, late * len(chunk) + chunk])


class _Rules(NamedTuple):
    """positions and hops: as ``Layout`` has them. multiple_of: (ring size, stripe size) -> what seq_length must be a
    multiple of; ``rule`` says it in words."""

    positions: Positions
    multiple_of: Callable[[int, int], int]
    rule: str
    hops: Callable[["Layout", int], int]


def _to_the_shard_looked_back_to(layout: "Layout", reach: int) -> int:
    return min(layout.ring_size, 1 + -(-reach // layout.shard_length))


def _all_around(layout: "Layout", reach: int) -> int:
    return layout.ring_size


_LAYOUTS: dict[str, _Rules] = {
    "none": _Rules(
        _contiguous, lambda ring_size, stripe: ring_size, "ring size", _to_the_shard_looked_back_to
    ),
    "ring": _Rules(
        _contiguous, lambda ring_size, stripe: ring_size, "ring size", _to_the_shard_looked_back_to
    ),
    "striped": _Rules(
        _striped,
        lambda ring_size, stripe: ring_size * stripe,
        "ring size x stripe size",
        _all_around,
    ),
    "zigzag": _Rules(
        _zigzag, lambda ring_size, stripe: 2 * ring_size, "2 x ring size", _all_around
    ),
}

NAMES = tuple(_LAYOUTS)


@dataclass(frozen=True)
class Layout:
    """Where the ``seq_length`` tokens of a sample live on a ring of ``ring_size`` ranks.

    Raises ConfigError when the layout cannot take the length; ``problems`` gives the reasons without raising.
    """

    name: str
    seq_length: int
    ring_size: int
    stripe_size: int = 1

    def __post_init__(self):
        if problems := self.problems(self.name, self.seq_length, self.ring_size, self.stripe_size):
            raise ConfigError(problems)

    @property
    def shard_length(self) -> int:
        """L, the tokens each ring rank owns."""
        return self.seq_length // self.ring_size

    def positions(
        self, ring_rank: int, ulysses_rank: int = 0, ulysses_size: int = 1
    ) -> torch.Tensor:
        """The positions in the sample of a process's tokens: (l,) int64, increasing.

        Of the shard of ``ring_rank``, Ulysses member u of U holds the u-th of U equal runs; alone, (L,), all of it.
        """
        assert 0 <= ring_rank < self.ring_size
        assert 0 <= ulysses_rank < ulysses_size
        assert self.shard_length % ulysses_size == 0
        return _LAYOUTS[self.name].positions(self, ring_rank).chunk(ulysses_size)[ulysses_rank]

    def hops(self, reach: int) -> int:
        """Hops after which no rank has anything left to see, when no query looks further back than ``reach`` tokens."""
        return _LAYOUTS[self.name].hops(self, reach)

    @staticmethod
    def problems(
        name: str, seq_length: int, ring_size: int, stripe_size: int = 1, ulysses_size: int = 1
    ) -> list[str]:
        """Why these numbers make no layout, each reason with its rule, the nearest legal values and the flag."""
        if name not in _LAYOUTS:
            return [
                f"context_parallel {name!r} is not a layout. Known: {', '.join(NAMES)}. Set --context-parallel."
            ]
        if stripe_size < 1:
            return [f"stripe_size {stripe_size} must be at least 1. Set --stripe-size."]
        if name == "none" and ring_size > 1:
            return [
                f"context_parallel none keeps whole sequences, but the ring has {ring_size} ranks. "
                "Set --context-parallel striped (or ring, zigzag), or --context-parallel-size 1."
            ]
        return _length_problems(name, seq_length, ring_size, stripe_size, ulysses_size)


def _length_problems(
    name: str, seq_length: int, ring_size: int, stripe_size: int, ulysses_size: int
) -> list[str]:
    finest, rule = ring_size * ulysses_size, _LAYOUTS[name].rule
    multiple = math.lcm(_LAYOUTS[name].multiple_of(ring_size, stripe_size), finest)
    if seq_length > 0 and seq_length % multiple == 0:
        return []
    ranks, remedy = f"{ring_size} ring ranks", "Set --seq-length"
    if ulysses_size > 1:
        ranks += f" of {ulysses_size} Ulysses ranks"
        rule += ", and ring size x Ulysses degree"
    if multiple != finest:
        striped = "striped with --stripe-size 1" if name == "striped" else "striped"
        remedy += f", or use --context-parallel {striped} (multiple of {finest})"
    return [
        f"seq_length {seq_length} cannot be laid out {name} on {ranks}: it must be a multiple of "
        f"{multiple} ({rule}). Nearest: {nearest_multiples(seq_length, multiple)}. {remedy}."
    ]


# Packed documents spread evenly over wide stripes only by their number: what that takes, measured in docs/log.md.
_ROUNDS_OF_A_PACK = 32
_ROUND_OF_A_PACK = 2048


def auto_stripe_size(
    seq_length: int, ring_size: int, widths: Sequence[int], packed: bool, window: int = 0
) -> int:
    """What --stripe-size auto stands for: the widest of a kernel's favourite ``widths`` that deals out evenly, else 1.

    Evenly is as often forth as back. Where documents are ``packed`` it is also in many rounds, and short ones unless no
    width is that narrow. A ``window`` should span two rounds; where no width is that narrow, the narrowest is the least
    uneven.
    """
    even = [width for width in widths if seq_length % (2 * ring_size * width) == 0]
    if packed:
        many = [width for width in even if ring_size * width * _ROUNDS_OF_A_PACK <= seq_length]
        return _widest(many, at_most=_ROUND_OF_A_PACK // ring_size)
    return _widest(even, at_most=window // (2 * ring_size) if window else seq_length)


def _widest(widths: Sequence[int], at_most: int) -> int:
    """The widest up to ``at_most``, else the narrowest of all, else single tokens."""
    return max((width for width in widths if width <= at_most), default=min(widths, default=1))
