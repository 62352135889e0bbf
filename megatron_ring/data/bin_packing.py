"""Bin packing: which pieces of text share a sample, so that few places stay empty and no piece is cut.

``greedy`` is next-fit: a piece goes behind the last one, or opens a new pack. ``best-fit`` is best-fit decreasing,
of Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3: longest first, each into the fullest
pack that takes it. Theirs looks at all pieces at once; here at one window of them after another, so that what it
needs beside its result does not grow with the corpus. Integers alone, so that every machine finds the same packs.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

WINDOW = 2**16
"""Pieces that best-fit looks at together."""


@dataclass(frozen=True)
class Packs:
    """Pack ``n`` holds ``pieces[bounds[n] : bounds[n + 1]]``. ``pieces`` (P,) and ``bounds`` (packs + 1,) are int64."""

    pieces: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, n: int) -> np.ndarray:
        return self.pieces[self.bounds[n] : self.bounds[n + 1]]


def greedy(lengths: np.ndarray, capacity: int) -> Packs:
    """Pieces of ``lengths`` (P,), each of 1 to ``capacity`` tokens, in their order."""
    ends = np.cumsum(lengths)
    bounds = [0]
    while bounds[-1] < len(lengths):
        before = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends, before + capacity, side="right")))
    return Packs(np.arange(len(lengths)), np.array(bounds))


def best_fit(lengths: np.ndarray, capacity: int, window: int = WINDOW) -> Packs:
    """As ``greedy``, but a pack takes pieces from anywhere in a window of them; within a pack they keep their order."""
    pack_of = np.empty(len(lengths), np.int64)
    packs = 0
    for first in range(0, len(lengths), window):
        found = _best_fit_decreasing(lengths[first : first + window], capacity)
        pack_of[first : first + window] = packs + found
        packs += int(found.max()) + 1
    bounds = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=packs))])
    return Packs(np.argsort(pack_of, kind="stable"), bounds)


def _best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The pack of each piece, (P,) int64; of two packs as full as each other it is the older one."""
    pack_of = np.empty(len(lengths), np.int64)
    packs, room = 0, []  # room: (places left, pack) of each pack that has some, the fullest first
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect_left(room, (length, 0))
        left, pack = room.pop(at) if at < len(room) else (capacity, packs)
        packs = max(packs, pack + 1)
        pack_of[piece] = pack
        if left > length:
            insort(room, (left - length, pack))
    return pack_of


FITS: dict[str, Callable[[np.ndarray, int], Packs]] = {"greedy": greedy, "best-fit": best_fit}
"""By the name that --packing has for it."""
