"""The loss, by one rule: the sum of token losses over the number of tokens that count, of the whole global batch.

Ranks and micro-batches may hold unequal numbers of counted tokens, none included, so a mean of means is wrong. Each
micro-batch gives its local sum (model/gpt.py); the count is taken over all micro-batches and all data x context ranks
before the first backward. DeepSpeed averages gradients over its data axis (D x C) and over micro-batches, hence the
factor. Tensor ranks and pipeline stages share a loss and are counted once.
"""

import math
from collections.abc import Callable, Iterable
from functools import cached_property

import torch
import torch.distributed as dist
from torch import nn

from megatron_ring.data.packing import IGNORED
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.tensor import split_of


def counted_tokens(targets_Bl: torch.Tensor) -> torch.Tensor:
    """How many targets count: a scalar, int64."""
    return (targets_Bl != IGNORED).sum()


def share_of_mean(global_count: torch.Tensor, averaged_over: int) -> torch.Tensor:
    """What to multiply local sums by, so that a mean over ``averaged_over`` such shares is the true token mean.

    ``averaged_over`` is D x C x micro-batches of a step: what DeepSpeed divides by.
    """
    return averaged_over / global_count.clamp(min=1)


def clip(
    parameters: Iterable[nn.Parameter], max_norm: float, groups: ProcessGroups
) -> torch.Tensor:
    """Scale the gradients down to ``max_norm`` where they exceed it; returns the norm before.

    Sums over the pipe x tensor ranks that hold one copy of all parameters between them; blocks.
    """
    held = [parameter for parameter in parameters if parameter.grad is not None]
    norm = _norm([p.grad for p in held if counts_here(p, groups)], held[0].device, groups.model)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in held:
        parameter.grad.mul_(factor)
    return norm


def counts_here(parameter: nn.Parameter, groups: ProcessGroups) -> bool:
    """Whether this process is the one of pipe x tensor where what ``parameter`` holds counts.

    Replicas count on the first tensor rank, and a tied embedding, which DeepSpeed marks, on the first stage.
    """
    first = groups.tensor is None or dist.get_rank(groups.tensor) == 0
    return (first or split_of(parameter) is not None) and not getattr(
        parameter, "ds_pipe_replicated", False
    )


def _norm(
    gradients: list[torch.Tensor], device: torch.device, model: dist.ProcessGroup | None
) -> torch.Tensor:
    norm = (
        torch.nn.utils.get_total_norm(gradients).to(device)
        if gradients
        else torch.zeros((), device=device)
    )
    if model is None:
        return norm
    square = norm.square()
    dist.all_reduce(square, group=model)
    return square.sqrt()


class StepGate:
    """One step's: refused, if its loss or gradient norm is not finite, or its loss is above ``highest_loss``.

    ``own_loss``: gives this process's share of the global mean, so that the sum over all processes is the mean.
    ``grad_norm``: gives the norm of the whole gradient; DeepSpeed has -1 for some that are not finite.
    """

    def __init__(
        self,
        own_loss: Callable[[], torch.Tensor],
        grad_norm: Callable[[], torch.Tensor | float],
        highest_loss: float,
    ):
        self._own_loss, self._grad_norm, self._highest_loss = own_loss, grad_norm, highest_loss

    @property
    def loss(self) -> float:
        """The mean over the global batch's counted tokens, nats."""
        return self._shared[0]

    @property
    def refused(self) -> bool:
        loss, norms = self._shared
        return not (math.isfinite(loss) and math.isfinite(norms) and loss <= self._highest_loss)

    @cached_property
    def _shared(self) -> tuple[float, float]:
        """(loss, 0 or nan), from one all-reduce of two numbers: all ranks get its bits, so all decide the same.

        The first to ask blocks until all processes have, and until the device is done with the gradient.
        """
        own_loss = self._own_loss().float()
        norm = torch.as_tensor(self._grad_norm(), dtype=torch.float32, device=own_loss.device)
        shared = torch.stack(
            [own_loss, torch.where(norm >= 0, norm * 0, math.nan)]
        )  # infinity x 0 is nan, too
        dist.all_reduce(shared)
        loss, norms = shared.tolist()
        return loss, norms
