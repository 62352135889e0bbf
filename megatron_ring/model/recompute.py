"""Recomputation in backward, of whole blocks (--recompute) and MLP chunks (--mlp-chunks).

A block runs under ``torch.utils.checkpoint``, which keeps its input. The results of chosen
operators are kept as well (Korthikanti et al. 2022, Reducing Activation Recomputation in Large
Transformer Models, section 5): the ring's output and log-sum-exp, so that backward does not run the
ring's forward again, and with ``selective`` every matmul.

torch has contexts for this (``create_selective_checkpoint_contexts``), but they return tensors that
were modified since: DeepSpeed's linear layer under ZeRO 3 adds its bias in place, and the bias was
added twice. Nor can ``saved_tensors_hooks`` move what they keep. Here autograd saves the results
like any other tensors, so that they are freed, counted and offloaded like any other.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from megatron_ring.config import MemoryConfig
from megatron_ring.context_parallel.attention import ring_attention
from megatron_ring.parallel.tensor_exchange import SharedInput, TensorParallel

DEFAULT_MEMORY = MemoryConfig()
"""Everything that backward needs is kept."""

Operators = frozenset[OpOverload]

_RING = frozenset({ring_attention._opoverload})
# The operators of linear layers and matmul, with and without a bias.
_MATMULS = frozenset(
    {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
)


# ---- regions that backward recomputes ----


def run_block(
    block: nn.Module, memory: MemoryConfig, x_BlE: torch.Tensor, *inputs: object
) -> torch.Tensor:
    """Return ``block(x_BlE, *inputs)``; backward recomputes what ``memory.recompute`` selects.

    The block must be a pure function of its inputs and parameters, without random numbers or
    counters. Tensors inside the other inputs, a rotation's for example, are held as long as the
    block's graph.
    """
    if memory.recompute == "none" or not torch.is_grad_enabled():
        return block(x_BlE, *inputs)
    results = KeptResults(kept_operators(memory))
    y_BlE = _recomputed(
        block, x_BlE, *inputs, contexts=lambda: (_Recording(results), _Replaying(results))
    )
    return save_for_backward(y_BlE, results)


def kept_operators(memory: MemoryConfig) -> Operators:
    """Return the operators of a block that run once, because their results are kept."""
    if memory.recompute == "selective":
        return _RING | _MATMULS
    return frozenset() if memory.recompute_attention else _RING


def in_chunks(
    layer: Callable[[torch.Tensor], torch.Tensor], x_BlE: torch.Tensor, chunks: int
) -> torch.Tensor:
    """Return ``layer(x_BlE)`` of a token-wise layer, over at most ``chunks`` parts of the sequence.

    The inner activations of only one chunk exist at a time: backward recomputes each chunk before
    it differentiates it, whatever is recomputed around it. In a block that is recomputed itself,
    all chunks but the last run three times. Blockwise Parallel Transformer (Liu and Abbeel 2023,
    section 3) and TiledMLP in DeepSpeed (Bekman et al. 2025, Arctic Long Sequence Training) do the
    same.

    Chunks have ceil(l / chunks) tokens, so there may be fewer than requested and the last may be
    shorter; ranks with equally many tokens have the same chunks. Collectives within ``layer`` run
    in the order of the chunks, in backward in reverse.
    """
    if chunks == 1:
        return layer(x_BlE)
    # One graph for all chunks: autograd sums the chunks' gradients of a parameter before it
    # delivers them, so ZeRO's hooks fire once per parameter, as without chunks.
    outputs = [
        _recomputed(layer, chunk, contexts=lambda: (nothing_kept(), contextlib.nullcontext()))
        for chunk in x_BlE.chunk(chunks, dim=1)
    ]
    return torch.cat(outputs, dim=1)


def shared_input(
    x_BmE: torch.Tensor, tensor: TensorParallel, recomputed: bool, sums_in_products: bool
) -> SharedInput | None:
    """Return how column-parallel layers share their input, gathered from ``x_BmE``; None: as is.

    Under sequence parallelism backward keeps the rank's own shard, gathered again in backward. A
    region that backward recomputes (``recomputed``) gathers its input in doing so: nothing is kept
    from forward to backward, and a second all-gather would be redundant.
    """
    keeps_shard = tensor.sequence_parallel and not recomputed
    if not (keeps_shard or sums_in_products):
        return None
    return SharedInput(x_BmE if keeps_shard else None, tensor, sums_in_products)


def _recomputed(
    region: Callable[..., torch.Tensor], *inputs: object, contexts: Callable
) -> torch.Tensor:
    return checkpoint(
        region, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )


# ---- results of operators, kept from forward and returned when backward recomputes the region ----

# True within ``nothing_kept``. A context variable, because modules nested in a region cannot be
# passed an argument. Each thread has its own value, and backward on a device runs in a thread of
# its own.
_NOTHING_KEPT: ContextVar[bool] = ContextVar("nothing_kept", default=False)


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Keep no results inside: the part of a region that a recomputation of its own covers."""
    token = _NOTHING_KEPT.set(True)
    try:
        yield
    finally:
        _NOTHING_KEPT.reset(token)


class KeptResults:
    """Results of ``operators`` in one region, in call order.

    Recomputation must call the operators in the same order.

    results: tensors, those of one call side by side. None: the tensor was modified, so the operator
    must run again.
    """

    def __init__(self, operators: Operators):
        self.operators = operators
        self.results: list[torch.Tensor | None] = []

    def covers(self, operator: OpOverload) -> bool:
        return operator in self.operators and not _NOTHING_KEPT.get()

    def add(self, results: Sequence[torch.Tensor]) -> None:
        # Detached: autograd is about to make the tensors themselves part of its graph.
        self.results += [x.detach() for x in results]

    def drop_aliases(self, modified: torch.Tensor) -> None:
        """Drop results that share memory with ``modified``, which are no longer the operator's."""
        # Not compared by address, which is 0 for every tensor on the meta device.
        storage = modified.untyped_storage()._cdata
        self.results = [
            None if x is None or x.untyped_storage()._cdata == storage else x for x in self.results
        ]

    def pop(self, count: int) -> list[torch.Tensor] | None:
        """Return the results of the next call, for another graph; None where they were not kept."""
        results = self.results[:count]
        self.results = self.results[count:]
        if any(x is None for x in results):
            return None
        return [x.detach() for x in results]


class _Recording(TorchDispatchMode):
    """Forward: run every operator and keep the results of the chosen ones."""

    def __init__(self, kept: KeptResults):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        results = operator(*args, **(kwargs or {}))
        for argument, value in zip(operator._schema.arguments, args):
            for modified in tree_leaves(value) if argument.is_write else ():
                self.kept.drop_aliases(modified)
        if self.kept.covers(operator):
            self.kept.add([results] if isinstance(results, torch.Tensor) else results)
        return results


_RECOMPUTING: ContextVar[bool] = ContextVar("recomputing", default=False)


def is_recomputing() -> bool:
    """Return whether backward is running a block again, whose outputs forward has seen already."""
    return _RECOMPUTING.get()


class _Replaying(TorchDispatchMode):
    """Backward: run every operator again, or return its kept results."""

    def __init__(self, kept: KeptResults):
        super().__init__()
        self.kept = kept

    def __enter__(self):
        self.token = _RECOMPUTING.set(True)
        return super().__enter__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if self.kept.covers(operator):
            count = len(operator._schema.returns)
            if results := self.kept.pop(count):
                return results[0] if count == 1 else tuple(results)
        return operator(*args, **(kwargs or {}))

    def __exit__(self, *exception):
        # Backward leaves the region once it has all it needs, possibly before the last result.
        self.kept.results = []
        _RECOMPUTING.reset(self.token)
        return super().__exit__(*exception)


def save_for_backward(y: torch.Tensor, kept: KeptResults) -> torch.Tensor:
    """Return ``y``, the region's result, whose backward begins by unpacking ``kept``."""
    results = kept.results
    kept.results = []
    return _SaveForBackward.apply(y, kept, *results)


class _SaveForBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, kept, *results):
        ctx.kept = kept
        ctx.save_for_backward(*results)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        ctx.kept.results = list(ctx.saved_tensors)
        return dy, None, *(None for _ in ctx.saved_tensors)
