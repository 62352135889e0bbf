"""Checks for non-finite values: a checkpoint with nan or infinity is neither written nor loaded."""

import torch

from megatron_ring.errors import CheckpointError


class NonFiniteTensor(CheckpointError):
    """Tensors of a checkpoint have values that are nan or infinite."""


def check_finite(values: torch.Tensor, name: str) -> None:
    """Raise NonFiniteTensor, with ``name`` and a count, if ``values`` has nan or infinity."""
    if count := count_non_finite(values):
        raise NonFiniteTensor(describe_non_finite(name, count))


def count_non_finite(values: torch.Tensor) -> int:
    """Return how many elements are nan or infinite.

    Blocks until the device of ``values`` has counted. A finite sum proves that every element is
    finite and takes one pass without a copy. Finite elements may have a sum that overflows, so
    elements are counted one by one if the sum is not finite.
    """
    wide = torch.float32 if values.dtype.itemsize < 4 else values.dtype
    if values.sum(dtype=wide).isfinite():
        return 0
    return values.numel() - int(values.isfinite().sum())


def describe_non_finite(name: str, count: int) -> str:
    """Return the error message for a tensor with ``count`` non-finite elements."""
    if count == 1:
        return f"{name} has 1 value that is nan or infinite"
    return f"{name} has {count:,} values that are nan or infinite"
