"""The head and the cross entropy in one step and in chunks, so that the full logits never exist.

``head_loss_sum`` is the loss of training, and ``head_token_scores`` the log-likelihood of each
target.

As in Liger-Kernel (Hsu et al. 2024, its fused linear cross entropy) and Cut Cross-Entropy (Wijmans
et al. 2024). The loss is a sum over tokens, so the gradients of a chunk are known as soon as its
logits are, up to the factor that arrives in backward. Forward computes them at once, with the same
three matrix products as the unchunked head, and discards the logits; backward scales them. This one
is plain torch, uses a sum instead of a mean, and supports a vocabulary that is split over
tensor-parallel ranks, as Megatron-LM's cross entropy does (Shoeybi et al. 2019, section 3). Between
the products of a chunk, the cross entropy of its logits may be another library's (fused/) if the
vocabulary is not split.

Dtypes. Products have the input's dtype: they accumulate in float32 internally and round once, the
logits included. Softmax, loss and the sum of the weight's gradient over chunks are float32; for
float64 inputs everything is float64. The gradients are computed before the loss scale is known, so
in float16 the smallest underflow.

Memory. During a chunk: its logits in float32, for smaller dtypes also in that dtype, and one
product for the weight. Kept for backward: the gradient of the hidden states, and that of the weight
in float32. The weight itself is not kept: ZeRO 3 frees it in between.

In this file ``N`` is all tokens, B x l, and ``c`` those of a chunk.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class VocabularyPart:
    """The rows of the head's matrix on this rank, from ``start`` on, and reductions over all parts.

    ``sum`` and ``max`` reduce a tensor over the parts in place and return it. Every part, also one
    without rows, calls ``max`` and then ``sum`` once per chunk.
    """

    start: int
    sum: Callable[[Tensor], Tensor]
    max: Callable[[Tensor], Tensor]


WHOLE = VocabularyPart(0, sum=lambda x: x, max=lambda x: x)
"""The vocabulary is not split, so there is nothing to reduce."""


class CrossEntropy(Protocol):
    """The cross entropy of one chunk, outside autograd."""

    def __call__(
        self,
        logits_cv: Tensor,
        target_c1: Tensor,
        part: VocabularyPart,
        ignore_index: int,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the sum in nats, float32 or float64, and its gradient in the dtype of the logits.

        The gradient may reuse the memory of the logits. Targets equal to ``ignore_index`` are
        ignored. If another target is not a row of any part, the sum is not finite.
        """


def head_loss_sum(
    hidden_BlE: Tensor,
    weight_vE: Tensor,
    targets_Bl: Tensor,
    chunk_size: int = 0,
    part: VocabularyPart | None = None,
    ignore_index: int = -100,
    cross_entropy: CrossEntropy | None = None,
) -> Tensor:
    """Return the sum of the cross entropies of hidden @ weight.T over all targets not ignored.

    The sum is a scalar in nats: 0 if every target is ignored, and not finite if one is not a row of
    any part. It supports a single backward: that scales the gradients in place, and torch refuses a
    second one through a retained graph.

    Args:
        chunk_size: The most tokens whose logits exist at the same time; 0: all.
        part: This rank's part of a split vocabulary, None if it is not split. The sum is that over
            the whole vocabulary, equal on all parts. The gradient of ``hidden_BlE`` is this part's
            contribution, which the caller must sum over the parts.
        ignore_index: The target of tokens to be ignored.
        cross_entropy: The function for a chunk's logits; None: ``softmax_cross_entropy``.
    """
    if not torch.is_grad_enabled():
        # no_grad is not visible inside a Function: tensors would still require a gradient there.
        hidden_BlE, weight_vE = hidden_BlE.detach(), weight_vE.detach()
    hidden_NE = hidden_BlE.flatten(0, -2)
    targets_N1 = targets_Bl.reshape(-1, 1)
    spec = _LossSpec(cross_entropy or softmax_cross_entropy, part or WHOLE, ignore_index)
    return _HeadLossSum.apply(hidden_NE, weight_vE, targets_N1, chunk_size, spec)


class _HeadLossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NE, weight_vE, targets_N1, chunk_size, spec):
        needs_dhidden, needs_dweight, *_ = ctx.needs_input_grad
        loss = hidden_NE.new_zeros((), dtype=_accumulation_dtype(hidden_NE))
        dhidden_NE = torch.empty_like(hidden_NE) if needs_dhidden else None
        dweight_vE = None
        if needs_dweight:
            dweight_vE = torch.zeros_like(weight_vE, dtype=_accumulation_dtype(weight_vE))
        for chunk in _chunks(len(hidden_NE), chunk_size):
            dhidden_cE = dhidden_NE[chunk] if needs_dhidden else None
            loss += _chunk_loss(
                hidden_NE[chunk], weight_vE, targets_N1[chunk], spec, dhidden_cE, dweight_vE
            )
        ctx.save_for_backward(dhidden_NE, dweight_vE)
        ctx.chunk_size, ctx.weight_dtype = chunk_size, weight_vE.dtype
        return loss

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():
            # once_differentiable would not raise this error where dloss is a constant.
            raise RuntimeError(
                "head_loss_sum has no second derivative: do not call backward with create_graph"
            )
        dhidden_NE, dweight_vE = ctx.saved_tensors
        if dhidden_NE is not None:
            for chunk in _chunks(len(dhidden_NE), ctx.chunk_size):
                # dloss must have one dimension: on CUDA a scalar is first rounded to the dtype of
                # the other operand, which would change all gradients.
                dhidden_NE[chunk].mul_(dloss.view(1))
        if dweight_vE is not None:
            dweight_vE = dweight_vE.mul_(dloss).to(ctx.weight_dtype)
        return dhidden_NE, dweight_vE, None, None, None


@dataclass(frozen=True)
class _LossSpec:
    """How the loss of a chunk's logits is computed; the same for all chunks."""

    cross_entropy: CrossEntropy
    part: VocabularyPart
    ignore_index: int


def _chunk_loss(
    hidden_cE: Tensor,
    weight_vE: Tensor,
    target_c1: Tensor,
    spec: _LossSpec,
    dhidden_cE: Tensor | None,
    dweight_vE: Tensor | None,
) -> Tensor:
    """Return the chunk's sum; write ``dhidden_cE`` and add to ``dweight_vE``, unless None."""
    with_gradient = dhidden_cE is not None or dweight_vE is not None
    loss, dlogits_cv = spec.cross_entropy(
        hidden_cE @ weight_vE.T, target_c1, spec.part, spec.ignore_index, with_gradient
    )
    if dhidden_cE is not None:
        torch.mm(dlogits_cv, weight_vE, out=dhidden_cE)
    if dweight_vE is not None:
        _add_product(dweight_vE, dlogits_cv.T, hidden_cE)
    return loss


def softmax_cross_entropy(
    logits_cv: Tensor,
    target_c1: Tensor,
    part: VocabularyPart,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Implement CrossEntropy in plain torch, for any part of a vocabulary; the default."""
    targets = _Targets.of(target_c1, logits_cv.shape[1], part, ignore_index)
    dtype = logits_cv.dtype
    logits_cv = logits_cv.to(_accumulation_dtype(logits_cv))
    losses_c1, total_c1 = _exponentiate(logits_cv, targets, part)
    gradient_cv = _gradient(logits_cv, total_c1, targets).to(dtype) if with_gradient else None
    return losses_c1.sum(), gradient_cv


class TokenScores(NamedTuple):
    """Of each token's target, (N,): its log-likelihood in nats, and whether it is the likeliest.

    Of several likeliest tokens the one with the lowest id counts, as in ``torch.argmax``. A target
    that is ignored has 0 and False.
    """

    log_likelihood_N: Tensor
    is_greedy_N: Tensor


@torch.no_grad()
def head_token_scores(
    hidden_NE: Tensor,
    weight_vE: Tensor,
    targets_N: Tensor,
    chunk_size: int = 0,
    part: VocabularyPart | None = None,
    ignore_index: int = -100,
) -> TokenScores:
    """Return the scores of the targets under hidden @ weight.T, without gradients.

    Arguments and dtypes are those of ``head_loss_sum``, of which the negative sum of the
    log-likelihoods is the result. Collective over the parts of the vocabulary.
    """
    part = part or WHOLE
    log_likelihood_N = hidden_NE.new_zeros(len(hidden_NE), dtype=_accumulation_dtype(hidden_NE))
    is_greedy_N = torch.zeros_like(targets_N, dtype=torch.bool)
    for chunk in _chunks(len(hidden_NE), chunk_size):
        logits_cv = hidden_NE[chunk] @ weight_vE.T
        target_c1 = targets_N[chunk, None]
        is_greedy_N[chunk] = (_likeliest(logits_cv, part) == target_c1).squeeze(1)
        targets = _Targets.of(target_c1, logits_cv.shape[1], part, ignore_index)
        losses_c1, _ = _exponentiate(logits_cv.to(log_likelihood_N.dtype), targets, part)
        log_likelihood_N[chunk] = -losses_c1.squeeze(1)
    return TokenScores(log_likelihood_N, is_greedy_N)


def _likeliest(logits_cv: Tensor, part: VocabularyPart) -> Tensor:
    """Return the id of the largest logit over all parts, (c, 1); the lowest of several."""
    largest_c1 = part.max(_row_max(logits_cv).to(_accumulation_dtype(logits_cv)))
    ids_v = part.start + torch.arange(logits_cv.shape[1], device=logits_cv.device)
    candidates_cv = torch.where(logits_cv == largest_c1, ids_v, torch.iinfo(torch.int64).max)
    # Reductions over parts have a maximum only; a part without columns has no candidate.
    lowest_c1 = torch.full_like(largest_c1, torch.iinfo(torch.int64).max, dtype=torch.int64)
    if logits_cv.shape[1]:
        lowest_c1 = candidates_cv.amin(1, keepdim=True)
    return -part.max(-lowest_c1)


@dataclass(frozen=True)
class _Targets:
    """The targets of a chunk, all (c, 1).

    counts: whether a target is not ignored. here: whether its row is in this part.
    row: that row, 0 where it is not here. In a part without rows ``row_c1`` is (c, 0): then nothing
        is gathered from it and nothing scattered.
    """

    counts_c1: Tensor
    here_c1: Tensor
    row_c1: Tensor

    @staticmethod
    def of(target_c1: Tensor, rows: int, part: VocabularyPart, ignore_index: int) -> "_Targets":
        counts_c1 = target_c1 != ignore_index
        row_c1 = target_c1 - part.start
        here_c1 = counts_c1 & (row_c1 >= 0) & (row_c1 < rows)
        return _Targets(counts_c1, here_c1, torch.where(here_c1, row_c1, 0)[:, :rows])


def _exponentiate(
    logits_cv: Tensor, targets: _Targets, part: VocabularyPart
) -> tuple[Tensor, Tensor]:
    """Replace ``logits_cv`` by exp(logit - row max); return the rows' losses and totals, (c, 1).

    The loss of an ignored target is 0.
    """
    logits_cv -= part.max(_row_max(logits_cv))
    target_c1 = logits_cv.gather(1, targets.row_c1).sum(1, keepdim=True) * targets.here_c1
    total_c1 = logits_cv.exp_().sum(1, keepdim=True)
    total_c1, target_c1, parts_c1 = part.sum(
        torch.stack([total_c1, target_c1, targets.here_c1.to(total_c1)])
    )
    # Exactly one part has the target's row. If none has, the data is wrong, and dividing by 0 makes
    # the loss infinite or nan instead of plausible.
    losses_c1 = (total_c1.log() - target_c1) / parts_c1
    return torch.where(targets.counts_c1, losses_c1, 0), total_c1


def _row_max(logits_cv: Tensor) -> Tensor:
    """Return the largest logit of every row, (c, 1); -inf in a part without columns."""
    if logits_cv.shape[1]:
        return logits_cv.amax(1, keepdim=True)
    return logits_cv.new_full((len(logits_cv), 1), -math.inf)


def _gradient(exp_cv: Tensor, total_c1: Tensor, targets: _Targets) -> Tensor:
    """Compute, in place of ``exp_cv``, softmax minus 1 at the target; 0 for ignored tokens."""
    exp_cv *= targets.counts_c1 / total_c1
    return exp_cv.scatter_add_(1, targets.row_c1, -targets.here_c1.to(exp_cv))


def _add_product(sum_vE: Tensor, a_vc: Tensor, b_cE: Tensor) -> None:
    """Add a @ b to the sum, in the dtype of the sum."""
    if sum_vE.dtype == b_cE.dtype:
        sum_vE.addmm_(a_vc, b_cE)
    else:
        sum_vE += a_vc @ b_cE


def _chunks(tokens: int, chunk_size: int) -> Iterator[slice]:
    size = chunk_size or max(tokens, 1)
    return (slice(start, start + size) for start in range(0, tokens, size))


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype for sums of such numbers: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
