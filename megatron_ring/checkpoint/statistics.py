"""What one looks at to see whether a tensor is in order, and how far two of one shape are apart.

Sums are float64, over the finite elements alone, so that one nan does not hide the rest; it is counted instead. A large
tensor is taken a stretch at a time: no copy of it in float64 is made.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_STRETCH = 2**20
"""Elements that are float64 at a time: 8 MiB."""


@dataclass(frozen=True)
class Statistics:
    """Of the finite elements: norm (the 2-norm), mean, largest (absolute value). not_finite: how many others."""

    norm: float
    mean: float
    largest: float
    not_finite: int


@dataclass(frozen=True)
class Difference:
    """Of b from a. equal: in type and in every element, nan being nan. not_finite: elements that are not so in both.

    Of the others: relative, |a - b| / |a| in the 2-norm (None where a is 0 and b is not); largest, the absolute one.
    """

    equal: bool
    relative: float | None
    largest: float
    not_finite: int


def type_name(tensor: torch.Tensor) -> str:
    """``"float32"``, as people and JSON have it."""
    return str(tensor.dtype).removeprefix("torch.")


def statistics(tensor: torch.Tensor) -> Statistics:
    """Of a tensor of any shape and floating type."""
    squares = total = largest = 0.0
    count = 0
    for (values,) in _stretches(tensor):
        finite = values[values.isfinite()]
        squares += float(finite.square().sum())
        total += float(finite.sum())
        largest = max(largest, _largest(finite))
        count += len(finite)
    return Statistics(math.sqrt(squares), total / max(count, 1), largest, tensor.numel() - count)


def difference(a: torch.Tensor, b: torch.Tensor) -> Difference:
    """Of two tensors of one shape."""
    squares = apart = largest = 0.0
    count = 0
    equal = a.dtype == b.dtype
    for of_a, of_b in _stretches(a, b):
        equal = equal and bool(((of_a == of_b) | (of_a.isnan() & of_b.isnan())).all())
        finite = of_a.isfinite() & of_b.isfinite()
        off = of_a[finite] - of_b[finite]
        squares += float(of_a[finite].square().sum())
        apart += float(off.square().sum())
        largest = max(largest, _largest(off))
        count += len(off)
    return Difference(
        equal, _ratio(math.sqrt(apart), math.sqrt(squares)), largest, a.numel() - count
    )


def _stretches(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same elements of each, as float64."""
    pieces = zip(*(tensor.flatten().split(_STRETCH) for tensor in tensors), strict=True)
    return (tuple(values.double() for values in stretch) for stretch in pieces)


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max()) if len(values) else 0.0


def _ratio(apart: float, norm: float) -> float | None:
    if norm:
        return apart / norm
    return None if apart else 0.0
