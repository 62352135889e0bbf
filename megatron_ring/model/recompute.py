"""What backward computes again instead of keeping: whole blocks (--recompute), and a block's pieces (--mlp-chunks).

A block runs under ``torch.utils.checkpoint``, which keeps its input, and the results of chosen operators are kept
besides (Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models, section 5): the ring's
output and log-sum-exp, so that its keys travel once forward and never again, and with ``selective`` every product of
matrices. Which tensors are kept is said here; ``kept.py`` keeps them.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_ring.context_parallel.attention import ring_attention
from megatron_ring.model.execution import Execution
from megatron_ring.model.kept import Keeping, Kept, Operators, Replaying, nothing_kept, saved

_RING = frozenset({ring_attention._opoverload})
# What linear layers and matmul come down to, with and without a bias.
_PRODUCTS = frozenset(
    {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
)


def run_block(
    block: nn.Module, execution: Execution, x_BlE: torch.Tensor, *inputs: object
) -> torch.Tensor:
    """``block(x_BlE, *inputs)``, and backward as much of it again as ``execution.recompute`` says.

    A block may be anything that is a function of its inputs and parameters: nothing random, nothing counted. Tensors
    within the other inputs, a rotation's for example, are held for as long as the block's graph is.
    """
    if execution.recompute == "none" or not torch.is_grad_enabled():
        return block(x_BlE, *inputs)
    kept = Kept(operators_kept(execution))
    y_BlE = _computed_again(
        block, x_BlE, *inputs, contexts=lambda: (Keeping(kept), Replaying(kept))
    )
    return saved(y_BlE, kept)


def operators_kept(execution: Execution) -> Operators:
    """The operators of a block that run once, because their results are kept."""
    if execution.recompute == "selective":
        return _RING | _PRODUCTS
    return frozenset() if execution.recompute_attention else _RING


def in_chunks(
    layer: Callable[[torch.Tensor], torch.Tensor], x_BlE: torch.Tensor, chunks: int
) -> torch.Tensor:
    """``layer(x_BlE)`` for a layer that takes every token by itself, at most ``chunks`` runs of tokens in turn.

    No more than one piece's inner activations exist at a time: backward computes each piece again before it is
    differentiated, whatever is recomputed around it; in a block that is itself computed again, all but the last piece
    run three times. Blockwise Parallel Transformer (Liu and Abbeel 2023, section 3); TiledMLP in DeepSpeed (Bekman et
    al. 2025, Arctic Long Sequence Training) is the same.

    Pieces are of ceil(l / chunks) tokens and so may be fewer than asked for, the last one shorter: alike on ranks with
    equally many tokens. Collectives within ``layer`` come in the order of the pieces, and backward in the reverse.
    """
    if chunks == 1:
        return layer(x_BlE)
    # One graph for all pieces: autograd sums their gradients of a parameter before it hands them over, so ZeRO's hooks
    # fire once for each parameter as they do without pieces.
    pieces = [
        _computed_again(layer, piece, contexts=lambda: (nothing_kept(), contextlib.nullcontext()))
        for piece in x_BlE.chunk(chunks, dim=1)
    ]
    return torch.cat(pieces, dim=1)


def _computed_again(
    region: Callable[..., torch.Tensor], *inputs: object, contexts: Callable
) -> torch.Tensor:
    return checkpoint(
        region, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
