"""The head and the cross entropy in one step, a chunk of tokens at a time, so that the whole logits never exist.

As in Liger-Kernel (Hsu et al. 2024, its fused linear cross entropy) and Cut Cross-Entropy (Wijmans et al. 2024). The
loss is a sum over tokens, so a chunk's gradients are known as soon as its logits are, but for the factor that arrives
backward: forward takes them at once, in the three products that the unchunked head takes too, and drops the logits;
backward scales. Ours is plain torch, takes no mean, and takes a vocabulary that is split over tensor ranks, as
Megatron-LM's cross entropy does (Shoeybi et al. 2019, section 3). What stands between the products of a chunk, the
cross entropy of its logits, may be another library's (fused/) where the vocabulary is whole.

Types. Products are of the input's type: they add up in float32 inside and round once, the logits included. Softmax,
loss and the weight's sum over chunks are float32; given float64, all is float64. The gradients are taken before the
loss scale is known, so float16 loses the smallest.

Memory. At work: one chunk's logits in float32, and for a smaller type in that as well, and one product for the weight.
Kept for backward: the gradient of the hidden states, and in float32 that of the weight. The weight itself is not: ZeRO
3 frees it in between.

In this file ``N`` is all tokens, B x l, and ``c`` those of a chunk.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class VocabularyPart:
    """Which rows of the head's matrix are here, those from ``start`` on, and how to meet the parts with the others.

    ``sum`` and ``max`` reduce a tensor over the parts in place and return it. Every part, one without a row too, calls
    ``max`` and then ``sum`` once a chunk.
    """

    start: int
    sum: Callable[[Tensor], Tensor]
    max: Callable[[Tensor], Tensor]


WHOLE = VocabularyPart(0, sum=lambda x: x, max=lambda x: x)
"""All rows are here, and there is nobody to meet."""


class CrossEntropy(Protocol):
    """The cross entropy of one chunk, outside of autograd."""

    def __call__(
        self,
        logits_cv: Tensor,
        target_c1: Tensor,
        part: VocabularyPart,
        ignore_index: int,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The chunk's sum in nats, float32 or float64, and its gradient in the logits, in their type.

        The logits' own memory may become the gradient's. Targets that are ``ignore_index`` count for nothing; where
        one is no row of any part the sum is not finite.
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
    """The sum of the cross entropies of the logits hidden @ weight.T, over the targets that are not ``ignore_index``.

    In nats, a scalar; 0 where no target counts, and not finite where one is no row of any part. Logits of
    ``chunk_size`` tokens at most exist at once, 0: of all. With ``part`` the sum is that over the whole vocabulary, the
    same on every part, and the gradient of ``hidden_BlE`` is this part's share of it: who calls adds up the parts'.
    ``cross_entropy`` takes a chunk's logits, None: ours.
    One backward only: it scales in place, and torch refuses a second one through a retained graph.
    """
    if not torch.is_grad_enabled():
        # Inside a Function no_grad cannot be seen: what would need a gradient still says so.
        hidden_BlE, weight_vE = hidden_BlE.detach(), weight_vE.detach()
    hidden_NE, targets_N1 = hidden_BlE.flatten(0, -2), targets_Bl.reshape(-1, 1)
    judge = _LossSpec(cross_entropy or softmax_cross_entropy, part or WHOLE, ignore_index)
    return _HeadLossSum.apply(hidden_NE, weight_vE, targets_N1, chunk_size, judge)


class _HeadLossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NE, weight_vE, targets_N1, chunk_size, judge):
        wants_dhidden, wants_dweight, *_ = ctx.needs_input_grad
        loss = hidden_NE.new_zeros((), dtype=_wide(hidden_NE))
        dhidden_NE = torch.empty_like(hidden_NE) if wants_dhidden else None
        dweight_vE = torch.zeros_like(weight_vE, dtype=_wide(weight_vE)) if wants_dweight else None
        for chunk in _chunks(len(hidden_NE), chunk_size):
            dhidden_cE = dhidden_NE[chunk] if wants_dhidden else None
            loss += _chunk_loss(
                hidden_NE[chunk], weight_vE, targets_N1[chunk], judge, dhidden_cE, dweight_vE
            )
        ctx.save_for_backward(dhidden_NE, dweight_vE)
        ctx.chunk_size, ctx.weight_dtype = chunk_size, weight_vE.dtype
        return loss

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():
            # once_differentiable would pass this over where dloss is a constant.
            raise RuntimeError(
                "head_loss_sum has no second derivative: backward through it takes no create_graph"
            )
        dhidden_NE, dweight_vE = ctx.saved_tensors
        if dhidden_NE is not None:
            for chunk in _chunks(len(dhidden_NE), ctx.chunk_size):
                # Of one dimension: a scalar on CUDA is rounded to the other's type first, which shifts all gradients.
                dhidden_NE[chunk].mul_(dloss.view(1))
        if dweight_vE is not None:
            dweight_vE = dweight_vE.mul_(dloss).to(ctx.weight_dtype)
        return dhidden_NE, dweight_vE, None, None, None


@dataclass(frozen=True)
class _LossSpec:
    """How the logits of a chunk are judged, alike for all chunks."""

    cross_entropy: CrossEntropy
    part: VocabularyPart
    ignore_index: int


def _chunk_loss(
    hidden_cE: Tensor,
    weight_vE: Tensor,
    target_c1: Tensor,
    judge: _LossSpec,
    dhidden_cE: Tensor | None,
    dweight_vE: Tensor | None,
) -> Tensor:
    """The chunk's sum. Its gradients are written to ``dhidden_cE`` and added to ``dweight_vE``, unless None."""
    wants_gradient = dhidden_cE is not None or dweight_vE is not None
    loss, dlogits_cv = judge.cross_entropy(
        hidden_cE @ weight_vE.T, target_c1, judge.part, judge.ignore_index, wants_gradient
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
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Ours, a CrossEntropy in plain torch over any part of a vocabulary."""
    targets = _Targets.of(target_c1, logits_cv.shape[1], part, ignore_index)
    dtype, logits_cv = logits_cv.dtype, logits_cv.to(_wide(logits_cv))
    loss, total_c1 = _exponentiate(logits_cv, targets, part)
    return loss, _gradient(logits_cv, total_c1, targets).to(dtype) if wants_gradient else None


@dataclass(frozen=True)
class _Targets:
    """A chunk's targets, all (c, 1): which count, which have their row here, and that row, 0 for the others.

    ``row_c1`` is (c, 0) in a part that has no row: then nothing is gathered from it and nothing scattered.
    """

    counts_c1: Tensor
    here_c1: Tensor
    row_c1: Tensor

    @staticmethod
    def of(target_c1: Tensor, rows: int, part: VocabularyPart, ignore_index: int) -> "_Targets":
        counts_c1, row_c1 = target_c1 != ignore_index, target_c1 - part.start
        here_c1 = counts_c1 & (row_c1 >= 0) & (row_c1 < rows)
        return _Targets(counts_c1, here_c1, torch.where(here_c1, row_c1, 0)[:, :rows])


def _exponentiate(
    logits_cv: Tensor, targets: _Targets, part: VocabularyPart
) -> tuple[Tensor, Tensor]:
    """The chunk's sum, and each token's total_c1 of exp(logit - largest), into which ``logits_cv`` is turned."""
    logits_cv -= part.max(_largest(logits_cv))
    target_c1 = logits_cv.gather(1, targets.row_c1).sum(1, keepdim=True) * targets.here_c1
    total_c1 = logits_cv.exp_().sum(1, keepdim=True)
    total_c1, target_c1, holders_c1 = part.sum(
        torch.stack([total_c1, target_c1, targets.here_c1.to(total_c1)])
    )
    # One part holds the target. Where none does, which is a fault of the data, the loss is not to look well.
    losses_c1 = (total_c1.log() - target_c1) / holders_c1
    return torch.where(targets.counts_c1, losses_c1, 0).sum(), total_c1


def _largest(logits_cv: Tensor) -> Tensor:
    """Of every row, (c, 1); -inf where the part has no column."""
    return (
        logits_cv.amax(1, keepdim=True)
        if logits_cv.shape[1]
        else logits_cv.new_full((len(logits_cv), 1), -math.inf)
    )


def _gradient(exp_cv: Tensor, total_c1: Tensor, targets: _Targets) -> Tensor:
    """Softmax less 1 at the target, and 0 for tokens that do not count; in place of ``exp_cv``."""
    exp_cv *= targets.counts_c1 / total_c1
    return exp_cv.scatter_add_(1, targets.row_c1, -targets.here_c1.to(exp_cv))


def _add_product(sum_vE: Tensor, a_vc: Tensor, b_cE: Tensor) -> None:
    """sum += a @ b, in the type of the sum."""
    if sum_vE.dtype == b_cE.dtype:
        sum_vE.addmm_(a_vc, b_cE)
    else:
        sum_vE += a_vc @ b_cE


def _chunks(tokens: int, chunk_size: int) -> Iterator[slice]:
    size = chunk_size or max(tokens, 1)
    return (slice(start, start + size) for start in range(0, tokens, size))


def _wide(x: Tensor) -> torch.dtype:
    """The type for sums of such numbers: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
