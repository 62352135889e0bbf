"""The memory layout that a kernel is fastest with: tokens before heads, as in a model, or after."""

from collections.abc import Sequence

import torch

from megatron_ring.kernels.attention.registry import KERNEL_SPECS


def to_kernel_layout(kernel: str, x_BLHD: torch.Tensor) -> torch.Tensor:
    """Return the tensor in the memory layout that ``kernel`` is fastest with; copy only if needed.

    There may be further dimensions before these.
    """
    if not _prefers_heads_first(kernel, x_BLHD):
        return x_BLHD
    return x_BLHD.transpose(-3, -2).contiguous().transpose(-3, -2)


def stack_to_kernel_layout(kernel: str, tensors_BLHD: Sequence[torch.Tensor]) -> torch.Tensor:
    """Combine ``torch.stack`` and ``to_kernel_layout`` in one copy.

    Nothing is copied if the tensors lie in memory as the result would.
    """
    if not _prefers_heads_first(kernel, tensors_BLHD[0]):
        if _are_adjacent(tensors_BLHD):
            return _StackWithoutCopy.apply(*tensors_BLHD)
        return torch.stack(tuple(tensors_BLHD))
    return torch.stack([x.transpose(-3, -2) for x in tensors_BLHD]).transpose(-3, -2)


def _are_adjacent(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether dense tensors of one shape follow each other in one storage."""
    first = tensors[0]
    return all(
        x.untyped_storage()._cdata == first.untyped_storage()._cdata
        and x.storage_offset() == first.storage_offset() + index * first.numel()
        and (x.shape, x.dtype) == (first.shape, first.dtype)
        and x.is_contiguous()
        for index, x in enumerate(tensors)
    )


class _StackWithoutCopy(torch.autograd.Function):
    """``torch.stack`` of adjacent tensors: a view of their storage."""

    @staticmethod
    def forward(ctx, *tensors):
        first = tensors[0]
        shape = (len(tensors), *first.shape)
        return first.as_strided(shape, (first.numel(), *first.stride()))

    @staticmethod
    def backward(ctx, gradient):
        return gradient.unbind()


def _prefers_heads_first(kernel: str, x: torch.Tensor) -> bool:
    spec = KERNEL_SPECS.get(kernel)
    return spec is not None and x.device.type in spec.heads_first
