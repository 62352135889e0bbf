"""Statistics of a tensor's values, and of the difference of two tensors of one shape.

Sums are float64 and over the finite elements only, so that one nan does not hide the rest; nan and
infinity are counted instead. A large tensor is processed in chunks, without a float64 copy of it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_CHUNK = 2**20
"""Elements that are float64 at a time: 8 MiB."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of the finite elements of a tensor.

    norm: 2-norm. largest: largest absolute value. not_finite: number of non-finite elements.
    """

    norm: float
    mean: float
    largest: float
    not_finite: int


@dataclass(frozen=True)
class Difference:
    """Difference of a tensor b from a tensor a.

    equal: same dtype and same elements, where nan equals nan. not_finite: elements that are not
    finite in both. relative, largest: over the other elements, |a - b| / |a| in the 2-norm (None if
    a is 0 and b is not), and the largest absolute difference.
    """

    equal: bool
    relative: float | None
    largest: float
    not_finite: int


def dtype_name(tensor: torch.Tensor) -> str:
    """Return the dtype without its module, such as ``"float32"``."""
    return str(tensor.dtype).removeprefix("torch.")


def statistics(tensor: torch.Tensor) -> Statistics:
    """Return the statistics of a tensor of any shape and floating-point dtype."""
    squares = 0.0
    total = 0.0
    largest = 0.0
    count = 0
    for (values,) in _chunks(tensor):
        finite = values[values.isfinite()]
        squares += float(finite.square().sum())
        total += float(finite.sum())
        largest = max(largest, _largest(finite))
        count += len(finite)
    return Statistics(math.sqrt(squares), total / max(count, 1), largest, tensor.numel() - count)


def difference(a: torch.Tensor, b: torch.Tensor) -> Difference:
    """Return the difference of two tensors of one shape."""
    squares_of_a = 0.0
    squares_of_difference = 0.0
    largest = 0.0
    count = 0
    equal = a.dtype == b.dtype
    for chunk_a, chunk_b in _chunks(a, b):
        both_nan = chunk_a.isnan() & chunk_b.isnan()
        equal = equal and bool(((chunk_a == chunk_b) | both_nan).all())
        finite = chunk_a.isfinite() & chunk_b.isfinite()
        finite_difference = chunk_a[finite] - chunk_b[finite]
        squares_of_a += float(chunk_a[finite].square().sum())
        squares_of_difference += float(finite_difference.square().sum())
        largest = max(largest, _largest(finite_difference))
        count += len(finite_difference)
    relative = _ratio(math.sqrt(squares_of_difference), math.sqrt(squares_of_a))
    return Difference(equal, relative, largest, a.numel() - count)


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the same elements of each tensor as float64, a chunk at a time."""
    for chunks in zip(*(tensor.flatten().split(_CHUNK) for tensor in tensors), strict=True):
        yield tuple(chunk.double() for chunk in chunks)


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max()) if len(values) else 0.0


def _ratio(difference_norm: float, norm: float) -> float | None:
    if norm:
        return difference_norm / norm
    return None if difference_norm else 0.0
