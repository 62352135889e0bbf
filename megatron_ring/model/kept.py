"""Results of chosen operators, kept from a region's forward and handed out when backward computes the region again.

torch has contexts for this (``create_selective_checkpoint_contexts``), but they hand out what was written to since:
DeepSpeed's linear layer under ZeRO 3 adds its bias to a product in place, and got it added twice. Nor can
``saved_tensors_hooks`` reach what they keep. Here autograd saves the results like any other tensors, so that these are
freed, counted and offloaded like any other.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Operators = frozenset[OpOverload]

# True within ``nothing_kept``. A context's variable, because what is called there is modules in modules, which pass
# nothing on; every thread has its own, and backward on a device runs in a thread of its own.
_NOTHING_KEPT: ContextVar[bool] = ContextVar("nothing_kept", default=False)


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Part of a region: whatever runs in it is run again, because somebody else sees to its memory."""
    token = _NOTHING_KEPT.set(True)
    try:
        yield
    finally:
        _NOTHING_KEPT.reset(token)


class Kept:
    """What ``operators`` gave in one region, call after call; the calls must come in the same order again.

    results: tensors, those of a call side by side. None: written to since, so that the operator must run again.
    """

    def __init__(self, operators: Operators):
        self.operators = operators
        self.results: list[torch.Tensor | None] = []

    def covers(self, operator: OpOverload) -> bool:
        return operator in self.operators and not _NOTHING_KEPT.get()

    def add(self, results: Sequence[torch.Tensor]) -> None:
        # Detached: autograd is about to make the very tensors part of its graph.
        self.results += [x.detach() for x in results]

    def forget(self, written: torch.Tensor) -> None:
        """Drop what shares its memory with ``written``: it is not what the operator gave any more."""
        memory = written.untyped_storage().data_ptr()
        self.results = [
            None if x is None or x.untyped_storage().data_ptr() == memory else x
            for x in self.results
        ]

    def take(self, count: int) -> list[torch.Tensor] | None:
        """The results of the next call, for another graph to take in; None where they were not kept."""
        results, self.results = self.results[:count], self.results[count:]
        return None if any(x is None for x in results) else [x.detach() for x in results]


class Keeping(TorchDispatchMode):
    """Forward: every operator runs, and what the chosen ones give is kept."""

    def __init__(self, kept: Kept):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        results = operator(*args, **(kwargs or {}))
        for argument, value in zip(operator._schema.arguments, args):
            for written in tree_leaves(value) if argument.is_write else ():
                self.kept.forget(written)
        if self.kept.covers(operator):
            self.kept.add([results] if isinstance(results, torch.Tensor) else results)
        return results


class Replaying(TorchDispatchMode):
    """Backward: every operator runs again but the chosen ones, in whose place their results are given."""

    def __init__(self, kept: Kept):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if self.kept.covers(operator):
            count = len(operator._schema.returns)
            if results := self.kept.take(count):
                return results[0] if count == 1 else tuple(results)
        return operator(*args, **(kwargs or {}))

    def __exit__(self, *exception):
        # The region is left as soon as backward has all it needs, and that may be before the last result.
        self.kept.results = []
        return super().__exit__(*exception)


def saved(y: torch.Tensor, kept: Kept) -> torch.Tensor:
    """``y``, the region's result, whose backward begins by fetching what autograd saved of ``kept``."""
    results, kept.results = kept.results, []
    return _Saved.apply(y, kept, *results)


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, kept, *results):
        ctx.kept = kept
        ctx.save_for_backward(*results)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        ctx.kept.results = list(ctx.saved_tensors)
        return dy, None, *(None for _ in ctx.saved_tensors)
