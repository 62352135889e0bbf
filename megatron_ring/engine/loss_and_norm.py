"""Loss and gradient norm of the global batch, and the gate that refuses a bad optimizer step.

Every token and every parameter counts exactly once, on whichever rank it lies.

The loss is the sum of token losses over the number of counted tokens of the whole global batch.
Ranks and micro-batches may hold different numbers of counted tokens, including none, so a mean of
means would be wrong. Each micro-batch gives a local sum (model/gpt.py); the tokens are counted over
all micro-batches and all data x context ranks before the first backward pass. DeepSpeed averages
gradients over its data axis (data x context) and over micro-batches; ``token_mean_factor``
compensates for that. Tensor ranks and pipeline stages share a loss, which counts once.

DeepSpeed computes the gradient norm in its ZeRO and half-precision optimizers. In fp32 without ZeRO
it reports none, and over pipeline stages it would leave out what only later stages hold, so
``clip_gradients`` replaces it there.
"""

import math
from collections.abc import Callable, Iterable
from functools import cached_property

import torch
import torch.distributed as dist
from torch import nn

from megatron_ring.data.document_boundaries import IGNORE_INDEX
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.tensor import split_of


def counted_tokens(targets_Bl: torch.Tensor) -> torch.Tensor:
    """Return the number of targets that count towards the loss: an int64 scalar."""
    return (targets_Bl != IGNORE_INDEX).sum()


def token_mean_factor(global_count: torch.Tensor, averaged_over: int) -> torch.Tensor:
    """Return the factor for local loss sums whose average is the mean over all counted tokens.

    ``averaged_over``: data x context ranks times micro-batches of a step, which DeepSpeed divides
    by.
    """
    return averaged_over / global_count.clamp(min=1)


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, groups: ProcessGroups
) -> torch.Tensor:
    """Scale gradients down to a global norm of at most ``max_norm``; return the norm before.

    All-reduces over the pipe x tensor ranks, which together hold every parameter once; blocks.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    counted = [p.grad for p in with_gradient if is_counted_here(p, groups)]
    norm = _global_norm(counted, with_gradient[0].device, groups.model)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in with_gradient:
        parameter.grad.mul_(factor)
    return norm


def is_counted_here(parameter: nn.Parameter, groups: ProcessGroups) -> bool:
    """Return whether this rank is the one of its pipe x tensor group that counts ``parameter``.

    A parameter replicated over tensor ranks counts on the first of them. A tied embedding counts on
    the first pipeline stage; DeepSpeed marks its copy on the last stage as ``ds_pipe_replicated``.
    """
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    is_first_tensor_rank = groups.tensor is None or dist.get_rank(groups.tensor) == 0
    return is_first_tensor_rank or split_of(parameter) is not None


def _global_norm(
    gradients: list[torch.Tensor], device: torch.device, group: dist.ProcessGroup | None
) -> torch.Tensor:
    norm = torch.zeros((), device=device)
    if gradients:
        norm = torch.nn.utils.get_total_norm(gradients).to(device)
    if group is None:
        return norm
    square = norm.square()
    dist.all_reduce(square, group=group)
    return square.sqrt()


class StepGate:
    """Decides for one step, with the same result on all ranks, whether its update is applied.

    A step is refused if its loss or gradient norm is not finite, or its loss is above
    ``highest_loss``. Adam's ``step`` checks the gate: every DeepSpeed engine calls it, whatever its
    ZeRO stage, dtype or pipeline, once the norm of the whole gradient is known and before any
    weight changes (ZeRO 1, 2 and 3 once for each of their parameter groups). A refused step leaves
    weights, moments, step counts and low-precision copies of the weights bit for bit as they were.
    Where DeepSpeed itself finds that the norm is not finite, it does not call Adam at all.

    ``own_loss`` returns this rank's share of the global mean; the shares of all ranks add up to it.
    ``grad_norm`` returns the norm of the whole gradient; DeepSpeed reports some non-finite ones
    as -1.
    """

    def __init__(
        self,
        own_loss: Callable[[], torch.Tensor],
        grad_norm: Callable[[], torch.Tensor | float],
        highest_loss: float,
    ):
        self._own_loss = own_loss
        self._grad_norm = grad_norm
        self._highest_loss = highest_loss

    @property
    def loss(self) -> float:
        """The mean over the global batch's counted tokens, in nats."""
        loss, _ = self._reduced
        return loss

    @property
    def refused(self) -> bool:
        """Whether the step must not change any weight."""
        loss, norm_check = self._reduced
        is_finite = math.isfinite(loss) and math.isfinite(norm_check)
        return not (is_finite and loss <= self._highest_loss)

    @cached_property
    def _reduced(self) -> tuple[float, float]:
        """(loss, 0 or nan) from one all-reduce of two numbers, so that all ranks decide the same.

        The second is nan if any rank's gradient norm is not finite. The first access blocks until
        all ranks have made theirs and the device has computed the gradient.
        """
        own_loss = self._own_loss().float()
        norm = torch.as_tensor(self._grad_norm(), dtype=torch.float32, device=own_loss.device)
        norm_check = torch.where(norm >= 0, norm * 0, math.nan)  # infinity x 0 is nan, too
        reduced = torch.stack([own_loss, norm_check])
        dist.all_reduce(reduced)
        loss, norm_check = reduced.tolist()
        return loss, norm_check
