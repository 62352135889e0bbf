"""Two counters of live tensor memory: by operator, and by the allocator.

``LiveMemory`` counts what operators return, with the same result on every machine. ``LiveBytes``
also sees the temporary buffers within an operator.
"""

from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Names of profiler events: its own for each allocation and release, and ours for forget_peak.
_MEMORY_EVENT = "[memory]"
_FORGET_EVENT = "forget the peak"


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


class LiveBytes:
    """Measures the tensor bytes that were allocated within this context.

    Memory that was allocated before is not counted. On a CPU the figures come from the profiler's
    record of the allocator, for this thread only; backward runs in it too. Memory that another
    thread frees, for example gloo's, stays counted: with several ranks a peak may be some MiB too
    high and is seldom exactly reproducible.

    Attributes:
        after: Bytes still alive at the end of the context.
        peak: The most bytes that were alive at once.
    """

    def __enter__(self) -> "LiveBytes":
        if torch.cuda.is_available():
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    def forget_peak(self) -> None:
        """Restart the peak from the bytes that are alive now."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            with record_function(_FORGET_EVENT):
                pass

    def __exit__(self, *error: object) -> None:
        if torch.cuda.is_available():
            self.after = torch.cuda.memory_allocated() - self._before
            self.peak = torch.cuda.max_memory_allocated() - self._before
        else:
            self._profile.__exit__(*error)
            self._replay(self._profile.profiler.kineto_results.events())

    def _replay(self, events: list) -> None:
        self.after = 0
        self.peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == _MEMORY_EVENT:
                self.after += event.nbytes()
                self.peak = max(self.peak, self.after)
            elif event.name() == _FORGET_EVENT:
                self.peak = self.after
