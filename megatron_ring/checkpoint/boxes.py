"""Boxes: which part of a whole tensor a process holds, so that it can be put together by other borders. No torch.

A tensor rank holds some rows or columns of a parameter, and of these ZeRO gives it a run of the flattened elements.
Such a run is no rectangle, but few of them side by side: the end of a row, whole rows, the beginning of another.
"""

import math
import re
from collections import Counter

Box = tuple[range, ...]
"""A rectangle of a tensor: for each dimension the indices it spans, one after another."""


def whole(shape: tuple[int, ...]) -> Box:
    """All of a tensor."""
    return tuple(map(range, shape))


def size(box: Box) -> int:
    """How many elements there are in it."""
    return math.prod(map(len, box))


def cut(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The boxes that elements ``start`` to ``stop`` of a tensor, flattened row by row, make up, in that order.

    >>> [text(box) for box in cut((4, 3), 2, 10)]
    ['0:1,2:3', '1:3,0:3', '3:4,0:1']
    """
    assert 0 <= start <= stop <= math.prod(shape)
    if start == stop:
        return []
    if len(shape) <= 1:
        return [(range(start, stop),) if shape else ()]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # rows that are whole: first to last
    if first > last:
        return _in_row(shape, last, start, stop)
    rows = [(range(first, last), *whole(shape[1:]))] if first < last else []
    return (
        _in_row(shape, first - 1, start, first * row)
        + rows
        + _in_row(shape, last, last * row, stop)
    )


def _in_row(shape: tuple[int, ...], n: int, start: int, stop: int) -> list[Box]:
    before = n * math.prod(shape[1:])
    inner = cut(shape[1:], start - before, stop - before) if start < stop else []
    return [(range(n, n + 1), *box) for box in inner]


def partition(found: list[Box], shape: tuple[int, ...]) -> bool:
    """Return whether every element of a tensor is in one of the boxes and in no other.

    In time linear in the boxes. How many boxes an element is in is a sum over the corners at or before it: a box adds
    one from its first corner on, and takes it away again at the ends of its sides. So the boxes make up the tensor if
    and only if their corners, with these signs, add up to the tensor's own.
    """
    if any(len(box) != len(shape) or not all(box) for box in found):
        return False
    signs: Counter[tuple[int, ...]] = Counter()
    for box in found:
        signs.update(_signed_corners(box))
    signs.subtract(_signed_corners(whole(shape)))
    return not any(signs.values())


def _signed_corners(box: Box) -> dict[tuple[int, ...], int]:
    corners = {(): 1}
    for indices in box:
        starts = {(*corner, indices.start): sign for corner, sign in corners.items()}
        corners = starts | {(*corner, indices.stop): -sign for corner, sign in corners.items()}
    return corners


def overlap(a: Box, b: Box) -> Box | None:
    """What is in both, None where that is nothing."""
    both = tuple(
        range(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True)
    )
    return both if all(both) else None


def within(box: Box, outer: Box) -> Box:
    """``box`` in indices that count from the corner of ``outer``."""
    return tuple(
        range(x.start - y.start, x.stop - y.start) for x, y in zip(box, outer, strict=True)
    )


def moved(box: Box, outer: Box) -> Box:
    """The other way around: a box in indices that count from the corner of ``outer``, in those of the whole."""
    return tuple(
        range(x.start + y.start, x.stop + y.start) for x, y in zip(box, outer, strict=True)
    )


def slices(box: Box) -> tuple[slice, ...]:
    """What indexes a tensor."""
    return tuple(slice(indices.start, indices.stop) for indices in box)


def text(box: Box) -> str:
    """As it is written in a checkpoint: ``"0:31,0:32"``; ``parse`` reads it."""
    return ",".join(f"{indices.start}:{indices.stop}" for indices in box)


def parse(written: str) -> Box:
    """Return the box that ``text`` was given. Raises ValueError for what ``text`` does not write."""
    if not _TEXT.fullmatch(written):
        raise ValueError(f"{written[:80]!r} is not a box")
    return tuple(range(*map(int, indices.split(":"))) for indices in written.split(",") if written)


_NUMBER = "(?:0|[1-9][0-9]{0,18})"
_TEXT = re.compile(f"(?:{_NUMBER}:{_NUMBER}(?:,{_NUMBER}:{_NUMBER})*)?")
