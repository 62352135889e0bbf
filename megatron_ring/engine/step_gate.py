"""The decision about a step, taken on all ranks alike when its loss and gradient are known and no weight has moved yet.

Adam's ``step`` asks for it. That is the one place that every DeepSpeed engine goes through, whatever its ZeRO stage,
dtype or pipeline, with the whole gradient's norm already taken; ZeRO 1, 2 and 3 ask once for each of their groups. A
step that is refused there leaves weights, moments, their counts and the copies that compute uses bit for bit as they
were. Where DeepSpeed itself finds the norm not finite it does not even ask, and moves nothing.
"""

import math
from collections.abc import Callable
from functools import cached_property

import torch
import torch.distributed as dist


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
