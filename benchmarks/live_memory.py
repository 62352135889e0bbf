"""Count the bytes of live tensors operator by operator, with the same result on every machine."""

from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the storage that operators allocate while this mode is on, until it is freed.

    Views allocate nothing.

    Attributes:
        counts: Predicate that selects which of the new tensors are counted.
        peak: The most bytes that were alive after any operator.
    """

    def __init__(self, counts: Callable[[torch.Tensor], bool] = lambda x: True):
        super().__init__()
        self.counts = counts
        self.sizes: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        inputs = {storage_of(x) for x in _tensors((args, kwargs))}
        results = operator(*args, **(kwargs or {}))
        for x in _tensors(results):
            if storage_of(x) not in inputs and self.counts(x):
                self.sizes[storage_of(x)] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, self.alive())
        return results

    def alive(self) -> int:
        """Return the bytes that were allocated and not yet freed."""
        self.sizes = {
            storage: size for storage, size in self.sizes.items() if not storage.expired()
        }
        return sum(self.sizes.values())


def storage_of(x: torch.Tensor) -> StorageWeakRef:
    """Return a weak reference to the storage of ``x``, which shows whether it was freed."""
    return StorageWeakRef(x.untyped_storage())


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
