"""Message buffers: several tensors as the bytes of one message, and a pool of receive buffers.

A tensor that is sent is dense: its elements are contiguous in memory, in any order of its
dimensions. The receiver takes that order from a tensor of its own that has the same form.
"""

import weakref
from collections.abc import Sequence

import torch


def storage_order_view(x: torch.Tensor) -> torch.Tensor:
    """Return the elements of a dense tensor in the order of memory: (elements,), a view."""
    return x.as_strided((x.numel(),), (1,))


def pack_bytes(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Copy the bytes of the tensors, one after another, to a new message: (bytes,) uint8.

    For alignment, tensors whose rows are whole heads must come first.
    """
    size = sum(x.nbytes for x in tensors)
    message = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
    for part, x in zip(unpack_bytes(message, tensors), tensors):
        part.copy_(x)
    return message


def unpack_bytes(message: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return views of a message with the shapes and types of the packed tensors, ``like``.

    Dense tensors keep their order in memory.
    """
    parts = message.split([x.nbytes for x in like])
    return [_shaped(part.view(x.dtype), x) for part, x in zip(parts, like)]


def _shaped(elements: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # The strides of ``like`` if it is dense, else contiguous ones.
    strides = torch.empty_like(like, device="meta").stride()
    return elements.as_strided(like.shape, strides)


class RowBuffers:
    """Memory for tensors like one, but with fewer rows in a dimension; ``count`` are used in turn.

    A buffer may be used again as soon as the device's stream waits for the message that it was in.

    Args:
        like: gives type, device, order of dimensions in memory and all other sizes.
        dim: the dimension of rows.
        most: rows that a tensor may have.
    """

    def __init__(self, like: torch.Tensor, dim: int, most: int, count: int):
        self._sizes = [*like.shape[:dim], 0, *like.shape[dim + 1 :]]
        self._dim = dim
        self._memory_order = sorted(range(like.ndim), key=lambda d: like.stride(d), reverse=True)
        self._like = like.new_empty(0)
        self._elements = like.numel() // like.shape[dim] * most
        self._count = count
        self._buffers: list[torch.Tensor] = []

    def next(self, rows: int) -> torch.Tensor:
        """Return an uninitialised dense tensor with so many rows, in the next buffer."""
        sizes = [*self._sizes]
        sizes[self._dim] = rows
        strides = [0] * len(sizes)
        elements = 1
        for dim in reversed(self._memory_order):
            strides[dim] = elements
            elements *= max(1, sizes[dim])
        is_new = len(self._buffers) < self._count
        buffer = self._like.new_empty(self._elements) if is_new else self._buffers.pop(0)
        self._buffers.append(buffer)
        return buffer.as_strided(sizes, strides)


class RecvBufferPool:
    """Receive buffers for one pass of a ring, reused as soon as their message has been sent on.

    Two buffers suffice for what goes around, for any number of hops. CUDA's caching allocator would
    reuse the memory of a message only after NCCL's streams are done with it, and the host, which
    does not wait for them, may be many hops ahead and would allocate new memory for every message.
    Reuse after the message was sent on is soon enough: the stream on which a hop computes waits for
    the send, and the next message into that buffer waits for that stream.
    """

    def __init__(self):
        self._free: list[torch.Tensor] = []
        self._in_use: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    def acquire(self, like: torch.Tensor) -> torch.Tensor:
        """Return an uninitialised tensor of the same shape, strides and type."""
        form = like.shape, like.stride(), like.dtype
        fits = [(x.shape, x.stride(), x.dtype) == form for x in self._free]
        tensor = self._free.pop(fits.index(True)) if any(fits) else torch.empty_like(like)
        self._in_use[id(tensor)] = tensor
        return tensor

    def release(self, tensor: torch.Tensor) -> None:
        """Return an acquired tensor to the pool; ignore tensors that are not from it."""
        if self._in_use.pop(id(tensor), None) is tensor:
            self._free.append(tensor)
