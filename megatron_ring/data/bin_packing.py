"""Bin packing: choose which pieces of text share a sample, so that little padding is needed.

Pieces are not cut. ``greedy`` is next-fit: a piece joins the last pack or opens a new one.
``best-fit`` is best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language
Modeling", section 3): longest piece first, each into the fullest pack that has room. The paper
packs all pieces at once; here they are packed in consecutive windows, so that memory other than the
result does not grow with the corpus.

``balanced`` is longest-processing-time-first scheduling (Graham 1969) with a limit of tokens: each
piece goes into the pack with the least attention work that has room. Best-fit collects long pieces
in few packs, which then have many times the attention work of others. All arithmetic is on
integers, so every machine computes the same packs.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

WINDOW = 2**16
"""Pieces that best-fit and balanced pack together."""


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
    return _pack_windows(_best_fit_decreasing, lengths, capacity, window)


def balanced(lengths: np.ndarray, capacity: int, window: int = WINDOW) -> Packs:
    """Pack pieces so that packs have even attention work, one window of pieces after another.

    Arguments and order as in ``best_fit``. Only as many packs are opened as the tokens of a window
    need at least, and one for every piece that then has room in none. The work of a pack counts the
    pairs of a causal mask within pieces; that of a piece of ``capacity`` tokens is the largest.
    """
    return _pack_windows(_least_work_first, lengths, capacity, window)


def _pack_windows(
    pack: Callable[[np.ndarray, int], np.ndarray], lengths: np.ndarray, capacity: int, window: int
) -> Packs:
    """Pack each window of pieces with ``pack``, which returns the pack of each piece."""
    pack_of = np.empty(len(lengths), np.int64)
    packs = 0
    for first in range(0, len(lengths), window):
        pack_in_window = pack(lengths[first : first + window], capacity)
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


def _least_work_first(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the pack of each piece, (pieces,) int64; of packs with equal work the oldest is used.

    Pieces only get shorter, so a pack without room for one is set aside until one fits again.
    """
    pack_of = np.empty(len(lengths), np.int64)
    free = [capacity] * -(-int(lengths.sum()) // capacity)
    by_work = [(0, pack) for pack in range(len(free))]  # (work, pack), a heap
    set_aside: list[tuple[int, int, int]] = []  # (-free tokens, work, pack), a heap
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        while set_aside and -set_aside[0][0] >= length:
            _, work, pack = heapq.heappop(set_aside)
            heapq.heappush(by_work, (work, pack))
        while by_work and free[by_work[0][1]] < length:
            work, pack = heapq.heappop(by_work)
            heapq.heappush(set_aside, (-free[pack], work, pack))
        if by_work:
            work, pack = heapq.heappop(by_work)
        else:
            work, pack = 0, len(free)
            free.append(capacity)
        pack_of[piece] = pack
        free[pack] -= length
        if free[pack]:
            heapq.heappush(by_work, (work + length * (length + 1) // 2, pack))
    return pack_of


PACKERS: dict[str, Callable[[np.ndarray, int], Packs]] = {
    "greedy": greedy,
    "best-fit": best_fit,
    "balanced": balanced,
}
"""The packing functions by their --packing name."""
