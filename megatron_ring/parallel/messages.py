"""Tensors as messages: their bytes as they lie in memory, and several, of several types, as one.

A tensor that is sent is dense: its numbers lie one behind the other, in whatever order of its dimensions. Who receives
it knows that order from a tensor of its own that is like it.
"""

from collections.abc import Sequence

import torch


def in_memory(x: torch.Tensor) -> torch.Tensor:
    """The numbers of a dense tensor in the order in which they lie in memory: (numbers,), a view."""
    return x.as_strided((x.numel(),), (1,))


def packed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensors' bytes, one after another: (bytes,) uint8. Those of rows of whole heads go first, for alignment."""
    message = torch.empty(
        sum(x.nbytes for x in tensors), dtype=torch.uint8, device=tensors[0].device
    )
    for place, x in zip(unpacked(message, tensors), tensors):
        place.copy_(x)
    return message


def unpacked(message: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of a message as tensors like those that ``packed`` was given: shapes, types, and order where dense."""
    parts = message.split([x.nbytes for x in like])
    return [_shaped(part.view(x.dtype), x) for part, x in zip(parts, like)]


def _shaped(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    strides = torch.empty_like(
        like, device="meta"
    ).stride()  # of what is not dense, contiguous ones
    return numbers.as_strided(like.shape, strides)
