"""Bin packing: choose which pieces of text share a sample, so that little padding is needed.

Pieces are not cut. ``greedy`` is next-fit: a piece joins the last pack or opens a new one.
``best-fit`` is best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language
Modeling", section 3): longest piece first, each into the fullest pack that has room. The paper
packs all pieces at once; here they are packed in consecutive windows, so that memory other than the
result does not grow with the corpus. All arithmetic is on integers, so every machine computes the
same packs.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

WINDOW = 2**16
"""Pieces that best-fit packs together."""


@dataclass(frozen=True)
class Packs:
    """Pack ``n`` holds ``pieces[bounds[n] : bounds[n + 1]]``.

    ``pieces`` (pieces,) and ``bounds`` (packs + 1,) are int64.
    """

    pieces: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, n: int) -> np.ndarray:
        return self.pieces[self.bounds[n] : self.bounds[n + 1]]


def greedy(lengths: np.ndarray, capacity: int) -> Packs:
    """Pack pieces in their order. ``lengths`` is (pieces,), each 1 to ``capacity`` tokens."""
    ends = np.cumsum(lengths)
    bounds = [0]
    while bounds[-1] < len(lengths):
        tokens_before = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends, tokens_before + capacity, side="right")))
    return Packs(np.arange(len(lengths)), np.array(bounds))


def best_fit(lengths: np.ndarray, capacity: int, window: int = WINDOW) -> Packs:
    """Pack pieces best-fit decreasing, one window of pieces after another.

    Arguments as in ``greedy``. Within a pack the pieces keep their order.
    """
    pack_of = np.empty(len(lengths), np.int64)
    packs = 0
    for first in range(0, len(lengths), window):
        pack_in_window = _best_fit_decreasing(lengths[first : first + window], capacity)
        pack_of[first : first + window] = packs + pack_in_window
        packs += int(pack_in_window.max()) + 1
    bounds = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=packs))])
    return Packs(np.argsort(pack_of, kind="stable"), bounds)


def _best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the pack of each piece, (pieces,) int64; of equally full packs the oldest is used."""
    pack_of = np.empty(len(lengths), np.int64)
    packs = 0
    open_packs: list[tuple[int, int]] = []  # (free tokens, pack) with free tokens > 0, ascending
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        i = bisect_left(open_packs, (length, 0))
        if i < len(open_packs):
            free, pack = open_packs.pop(i)
        else:
            free, pack = capacity, packs
            packs += 1
        pack_of[piece] = pack
        if free > length:
            insort(open_packs, (free - length, pack))
    return pack_of


FITS: dict[str, Callable[[np.ndarray, int], Packs]] = {"greedy": greedy, "best-fit": best_fit}
"""The packing functions by their --packing name."""
