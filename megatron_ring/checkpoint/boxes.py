"""Boxes: the rectangular parts of a whole tensor that processes hold. Does not import torch.

A tensor-parallel rank holds some rows or columns of a parameter, and ZeRO gives it a range of the
flattened elements of these. Such a range is not a rectangle but a few rectangles one after another:
the end of a row, whole rows, the beginning of a row. Tensors are stored as such boxes, so that
processes of any other grid can read the boxes that overlap theirs.
"""

import math
import re
from collections import Counter

Box = tuple[range, ...]
"""A rectangle of a tensor: for each dimension the contiguous range of its indices."""


def whole(shape: tuple[int, ...]) -> Box:
    """Return the box that spans a whole tensor."""
    return tuple(map(range, shape))


def size(box: Box) -> int:
    """Return the number of elements in a box."""
    return math.prod(map(len, box))


def cut(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Return the boxes that make up elements ``start`` to ``stop`` of the tensor flattened by rows.

    They are in the order of the elements.

    >>> [to_text(box) for box in cut((4, 3), 2, 10)]
    ['0:1,2:3', '1:3,0:3', '3:4,0:1']
    """
    assert 0 <= start <= stop <= math.prod(shape)
    if start == stop:
        return []
    if len(shape) <= 1:
        return [(range(start, stop),) if shape else ()]
    row_size = math.prod(shape[1:])
    first_whole_row = -(-start // row_size)
    after_whole_rows = stop // row_size
    if first_whole_row > after_whole_rows:
        return _within_row(shape, after_whole_rows, start, stop)
    boxes = _within_row(shape, first_whole_row - 1, start, first_whole_row * row_size)
    if first_whole_row < after_whole_rows:
        boxes.append((range(first_whole_row, after_whole_rows), *whole(shape[1:])))
    return boxes + _within_row(shape, after_whole_rows, after_whole_rows * row_size, stop)


def _within_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    if start >= stop:
        return []
    row_start = row * math.prod(shape[1:])
    inner = cut(shape[1:], start - row_start, stop - row_start)
    return [(range(row, row + 1), *box) for box in inner]


def is_partition(boxes: list[Box], shape: tuple[int, ...]) -> bool:
    """Return whether every element of a tensor is in exactly one of the boxes.

    Takes time linear in the number of boxes. The number of boxes that contain an element is a sum
    over the corners at or before it: a box adds one from its first corner on and subtracts it again
    at the ends of its sides. So the boxes partition the tensor if and only if their signed corners
    add up to those of the tensor itself.
    """
    if any(len(box) != len(shape) or not all(box) for box in boxes):
        return False
    signs: Counter[tuple[int, ...]] = Counter()
    for box in boxes:
        signs.update(_signed_corners(box))
    signs.subtract(_signed_corners(whole(shape)))
    return not any(signs.values())


def _signed_corners(box: Box) -> dict[tuple[int, ...], int]:
    corners = {(): 1}
    for indices in box:
        starts = {(*corner, indices.start): sign for corner, sign in corners.items()}
        stops = {(*corner, indices.stop): -sign for corner, sign in corners.items()}
        corners = starts | stops
    return corners


def overlap(a: Box, b: Box) -> Box | None:
    """Return the intersection of two boxes, None if it is empty."""
    both = tuple(
        range(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True)
    )
    return both if all(both) else None


def relative_to(box: Box, outer: Box) -> Box:
    """Return ``box`` in indices that count from the first corner of ``outer``."""
    return tuple(
        range(x.start - y.start, x.stop - y.start) for x, y in zip(box, outer, strict=True)
    )


def moved(box: Box, outer: Box) -> Box:
    """Return a box given relative to ``outer`` in indices of the whole tensor.

    It is the inverse of ``relative_to``.
    """
    return tuple(
        range(x.start + y.start, x.stop + y.start) for x, y in zip(box, outer, strict=True)
    )


def slices(box: Box) -> tuple[slice, ...]:
    """Return the box as an index for a tensor."""
    return tuple(slice(indices.start, indices.stop) for indices in box)


def to_text(box: Box) -> str:
    """Return the box as it is written in a checkpoint: ``"0:31,0:32"``."""
    return ",".join(f"{indices.start}:{indices.stop}" for indices in box)


def parse(text: str) -> Box:
    """Return the box that ``to_text`` has written. Raises ValueError for any other text."""
    if not _TEXT.fullmatch(text):
        raise ValueError(f"{text[:80]!r} is not a box")
    return tuple(range(*map(int, indices.split(":"))) for indices in text.split(",") if indices)


_NUMBER = "(?:0|[1-9][0-9]{0,18})"
_TEXT = re.compile(f"(?:{_NUMBER}:{_NUMBER}(?:,{_NUMBER}:{_NUMBER})*)?")
