"""Finite tensors: a checkpoint with nan or infinity in it is neither written nor loaded."""

import torch

from megatron_ring.errors import CheckpointError


class NotFinite(CheckpointError):
    """Tensors of a checkpoint have values that are nan or infinite."""


def check_finite(values: torch.Tensor, name: str) -> None:
    """Raise NotFinite, with ``name`` and a count, where ``values`` has nan or infinity."""
    if count := count_not_finite(values):
        raise NotFinite(not_finite(name, count))


def count_not_finite(values: torch.Tensor) -> int:
    """How many elements are nan or infinite. Blocks until the device of ``values`` has counted.

    A sum is finite only if every addend is, and takes one pass without a copy. A sum of finite
    elements may overflow, so elements are looked at one by one where it is not finite.
    """
    wide = torch.float32 if values.dtype.itemsize < 4 else values.dtype
    if values.sum(dtype=wide).isfinite():
        return 0
    return values.numel() - int(values.isfinite().sum())


def not_finite(name: str, count: int) -> str:
    """What an error says of a tensor of which ``count`` elements are not finite."""
    return f"{name} has {count:,} value{'s' * (count > 1)} that {'are' if count > 1 else 'is'} nan or infinite"
