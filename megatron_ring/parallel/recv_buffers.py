"""Memory in which messages arrive, and which is used again as soon as what arrived there has been passed on.

CUDA's allocator is told which of a message NCCL's streams are at, and has its memory back only when they are through
with it. The host does not wait for them and may be many hops ahead: it would take new memory for the messages of each.
Here a message that has been passed on leaves its place to the next one. That is soon enough: the stream on which a hop
computes waits for what was sent, and what arrives waits for that stream.
"""

import weakref

import torch


class RecvBufferPool:
    """Of one pass of a ring: two places for what goes around, however many hops there are."""

    def __init__(self):
        self._free: list[torch.Tensor] = []
        self._taken: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    def acquire(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor like this one, dense as it is, whatever is in it."""
        fits = [
            (x.shape, x.stride(), x.dtype) == (like.shape, like.stride(), like.dtype)
            for x in self._free
        ]
        tensor = self._free.pop(fits.index(True)) if any(fits) else torch.empty_like(like)
        self._taken[id(tensor)] = tensor
        return tensor

    def release(self, tensor: torch.Tensor) -> None:
        """What was taken here and is needed no more; of what is from elsewhere nothing is kept."""
        if self._taken.pop(id(tensor), None) is tensor:
            self._free.append(tensor)
