"""What a kernel is faster with, as measured (docs/log.md): wide stripes, and each head's tokens together in memory."""

from collections.abc import Sequence

import torch

# Whole tiles of the mask, which leave rectangles on every hop but the first.
_STRIPE_WIDTHS = {("sdpa", "cpu"): (2048, 1024, 512, 256, 128)}

# Torch's CPU kernel reads a head's rows from end to end, in a model's order of memory with the other heads' between.
_HEADS_FIRST = {("sdpa", "cpu")}


def stripe_widths(kernel: str, device_type: str) -> tuple[int, ...]:
    """The widths of stripe that a kernel is faster with than with single tokens, the widest and best first."""
    return _STRIPE_WIDTHS.get((kernel, device_type), ())


def to_kernel_layout(kernel: str, x_BLHD: torch.Tensor) -> torch.Tensor:
    """The same tensor, in memory as ``kernel`` would have it: a copy where it was not.

    Any dimensions may stand before these. A kernel without a preference has it as it is.
    """
    if not _prefers_heads_first(kernel, x_BLHD):
        return x_BLHD
    return x_BLHD.transpose(-3, -2).contiguous().transpose(-3, -2)


def stack_to_kernel_layout(kernel: str, tensors_BLHD: Sequence[torch.Tensor]) -> torch.Tensor:
    """``torch.stack``, and ``to_kernel_layout`` at once."""
    if not _prefers_heads_first(kernel, tensors_BLHD[0]):
        return torch.stack(tuple(tensors_BLHD))
    return torch.stack([x.transpose(-3, -2) for x in tensors_BLHD]).transpose(-3, -2)


def _prefers_heads_first(kernel: str, x: torch.Tensor) -> bool:
    return (kernel, x.device.type) in _HEADS_FIRST
