"""Packs of documents for benchmarks and pictures: many short documents and few long ones, as corpora have them.

Lengths are lognormal. Nothing is read: how real tokens fall into documents is in data/packing.py.
"""

import math
from collections.abc import Sequence

import torch

SPREAD = 1.0
"""Standard deviation of the logarithm of a length: the mean token lies in a document of e times the mean length."""


def random_starts(mean: float, seq_length: int, samples: int = 1, seed: int = 0) -> tuple[int, ...]:
    """Where documents of ``mean`` length begin in ``samples`` packs of ``seq_length`` tokens laid end to end.

    The last document of a pack is cut at its edge. The same everywhere for the same ``seed``.
    """
    generator = torch.Generator().manual_seed(seed)
    packs = [starts_of(_lengths(mean, seq_length, generator), seq_length) for _ in range(samples)]
    return tuple(
        sample * seq_length + start for sample, starts in enumerate(packs) for start in starts
    )


def starts_of(lengths: Sequence[int], seq_length: int) -> tuple[int, ...]:
    """Where documents of these lengths begin, one after another, as far as ``seq_length`` tokens reach."""
    ends = torch.tensor(lengths).cumsum(0)
    return 0, *ends[ends < seq_length].tolist()


def _lengths(mean: float, seq_length: int, generator: torch.Generator) -> list[int]:
    """As many as fill ``seq_length`` tokens at the least, were each a single token."""
    normal = torch.randn(seq_length, generator=generator, dtype=torch.float64)
    centre = math.log(mean) - SPREAD**2 / 2  # of the logarithm, for that mean of the lengths
    return (centre + SPREAD * normal).exp().round().clamp(min=1).long().tolist()
