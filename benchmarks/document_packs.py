"""Random document boundaries for benchmarks and pictures, with lengths distributed as in a corpus.

Lengths are lognormal: many documents are short and few are long. No data is read; how real tokens
are split into documents is in data/document_boundaries.py.
"""

import math
from collections.abc import Sequence

import torch

SPREAD = 1.0
"""Standard deviation of the logarithm of a document's length.

With 1.0 the average token lies in a document that is e times as long as the average document.
"""


def random_starts(mean: float, seq_length: int, samples: int = 1, seed: int = 0) -> tuple[int, ...]:
    """Return the first positions of random documents in ``samples`` packs laid end to end.

    Each pack has ``seq_length`` tokens; its last document is cut at the end of the pack. The
    result depends on the arguments alone and is the same on every machine.

    Args:
        mean: Mean length of a document in tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = []
    for sample in range(samples):
        offset = sample * seq_length
        lengths = _lengths(mean, seq_length, generator)
        starts += [offset + start for start in starts_of(lengths, seq_length)]
    return tuple(starts)


def starts_of(lengths: Sequence[int], seq_length: int) -> tuple[int, ...]:
    """Return the first positions of consecutive documents, up to ``seq_length`` tokens."""
    ends = torch.tensor(lengths).cumsum(0)
    return 0, *ends[ends < seq_length].tolist()


def _lengths(mean: float, seq_length: int, generator: torch.Generator) -> list[int]:
    """Return enough lengths to fill ``seq_length`` tokens even if every document had one token."""
    normal = torch.randn(seq_length, generator=generator, dtype=torch.float64)
    log_mean = math.log(mean) - SPREAD**2 / 2  # mean of the logarithm that gives lengths this mean
    return (log_mean + SPREAD * normal).exp().round().clamp(min=1).long().tolist()
