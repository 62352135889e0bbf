"""Bytes of tensors that are alive, counted operator by operator: the same on every machine and in every run."""

from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While it is on, what an operator makes is counted until it is freed. Views make nothing.

    counts: which of the tensors that are made to count. peak: the most bytes that were alive after an operator.
    """

    def __init__(self, counts: Callable[[torch.Tensor], bool] = lambda x: True):
        super().__init__()
        self.counts = counts
        self.sizes: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        given = {storage_of(x) for x in _tensors((args, kwargs))}
        results = operator(*args, **(kwargs or {}))
        made = [x for x in _tensors(results) if storage_of(x) not in given and self.counts(x)]
        self.sizes |= {storage_of(x): x.untyped_storage().nbytes() for x in made}
        self.peak = max(self.peak, self.alive())
        return results

    def alive(self) -> int:
        """Bytes of all that was made and is not freed."""
        self.sizes = {
            storage: size for storage, size in self.sizes.items() if not storage.expired()
        }
        return sum(self.sizes.values())


def storage_of(x: torch.Tensor) -> StorageWeakRef:
    """Tells whether the memory of ``x`` is freed, and holds none of it."""
    return StorageWeakRef(x.untyped_storage())


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
