"""Boxes: which part of a whole tensor a process holds, so that it can be put together by other borders. No torch.

A tensor rank holds some rows or columns of a parameter, and of these ZeRO gives it a run of the flattened elements.
Such a run is no rectangle, but few of them side by side: the end of a row, whole rows, the beginning of another.
"""

import math

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
    return _in_row(shape, first - 1, start, first * row) + rows + _in_row(shape, last, last * row, stop)


def _in_row(shape: tuple[int, ...], n: int, start: int, stop: int) -> list[Box]:
    before = n * math.prod(shape[1:])
    inner = cut(shape[1:], start - before, stop - before) if start < stop else []
    return [(range(n, n + 1), *box) for box in inner]


def partition(found: list[Box], shape: tuple[int, ...]) -> bool:
    """Whether every element of a tensor is in one of the boxes and in no other."""
    inside = all(overlap(box, whole(shape)) == box for box in found)
    return inside and sum(map(size, found)) == math.prod(shape) and _apart(found)


def _apart(found: list[Box]) -> bool:
    """Sorted by their first rows, a box can meet those before it that do not end above it; they are few."""
    open_ones: list[Box] = []
    for box in sorted(found, key=lambda box: [indices.start for indices in box]):
        open_ones = [other for other in open_ones if other[0].stop > box[0].start]
        if any(overlap(box, other) for other in open_ones):
            return False
        open_ones.append(box)
    return True


def overlap(a: Box, b: Box) -> Box | None:
    """What is in both, None where that is nothing."""
    both = tuple(range(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return both if all(both) else None


def within(box: Box, outer: Box) -> Box:
    """``box`` in indices that count from the corner of ``outer``."""
    return tuple(range(x.start - y.start, x.stop - y.start) for x, y in zip(box, outer, strict=True))


def moved(box: Box, outer: Box) -> Box:
    """The other way around: a box in indices that count from the corner of ``outer``, in those of the whole."""
    return tuple(range(x.start + y.start, x.stop + y.start) for x, y in zip(box, outer, strict=True))


def slices(box: Box) -> tuple[slice, ...]:
    """What indexes a tensor."""
    return tuple(slice(indices.start, indices.stop) for indices in box)


def text(box: Box) -> str:
    """As it is written in a checkpoint: ``"0:31,0:32"``; ``parse`` reads it."""
    return ",".join(f"{indices.start}:{indices.stop}" for indices in box)


def parse(written: str) -> Box:
    """Raises ValueError for what ``text`` did not write."""
    box = tuple(range(*map(int, indices.split(":", 1))) for indices in written.split(",") if written)
    if text(box) != written:
        raise ValueError(f"{written!r} is not a box")
    return box
