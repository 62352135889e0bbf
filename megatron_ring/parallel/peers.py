"""Which ranks of a ring a rank sends to and receives from in one exchange.

Around the ring a message goes a fixed distance. Where rows go directly from their owner to their
readers (context_parallel/direct.py), the order in which a rank exchanges with the others is free.
In the order of this module neighbours come first. Ranks and hops, both from 0, are written in mixed
radix over the prime factors of the ring size, the smallest factor at the lowest digit. In hop t a
rank sends to the rank whose digits are the sums of its own and those of t, digit by digit and
without carry. If the ring size is a power of two, rank j exchanges with rank j XOR t. So the first
hops stay within groups of neighbouring ranks, and documents that are divided over such groups give
all of them work in the same hops (docs/decisions/0029).
"""

import functools
from typing import NamedTuple

import numpy as np


class Peers(NamedTuple):
    """The ring ranks that a rank sends to and receives from."""

    receiver: int
    sender: int

    @property
    def reversed(self) -> "Peers":
        """The peers of the exchange in the opposite direction."""
        return Peers(self.sender, self.receiver)


def peers_at_distance(ring_rank: int, ring_size: int, distance: int) -> Peers:
    """Return the peers of an exchange in which messages go ``distance`` ranks on, or back."""
    return Peers((ring_rank + distance) % ring_size, (ring_rank - distance) % ring_size)


def peers_in_hop(ring_rank: int, ring_size: int, hop: int) -> Peers:
    """Return the peers of a rank in a hop of the order described above; itself in hop 0."""
    return Peers(
        int(receivers_RR(ring_size)[hop, ring_rank]), int(senders_RR(ring_size)[hop, ring_rank])
    )


def group_sizes(ring_size: int) -> list[int]:
    """Return the sizes of groups of neighbouring ranks that exchange only within themselves first.

    The ring size is the last: 2, 4, 8 for 8 ranks, 2, 6 for 6. A group of n starts at a multiple of
    n, and its members exchange with each other in the first n hops.
    """
    sizes = np.cumprod(_prime_factors(ring_size), dtype=int)
    return sizes.tolist() if len(sizes) else [1]


@functools.lru_cache(maxsize=8)
def senders_RR(ring_size: int) -> np.ndarray:
    """Return the rank from which each rank receives in each hop: (hops, ranks) int64."""
    return _peers_RR(ring_size, towards=-1)


@functools.lru_cache(maxsize=8)
def receivers_RR(ring_size: int) -> np.ndarray:
    """Return the rank to which each rank sends in each hop: (hops, ranks) int64."""
    return _peers_RR(ring_size, towards=1)


def _peers_RR(ring_size: int, towards: int) -> np.ndarray:
    hop = np.arange(ring_size)[:, None]
    rank = np.arange(ring_size)
    peers = np.zeros((ring_size, ring_size), dtype=np.int64)
    place = 1
    for factor in _prime_factors(ring_size):
        digit = (rank // place + towards * (hop // place)) % factor
        peers += place * digit
        place *= factor
    return peers


def _prime_factors(number: int) -> list[int]:
    """Return the prime factors of a number in increasing order; none for 1."""
    factors = []
    factor = 2
    while number > 1:
        if number % factor:
            factor += 1
        else:
            factors.append(factor)
            number //= factor
    return factors
