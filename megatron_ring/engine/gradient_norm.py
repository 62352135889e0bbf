"""The norm of the whole gradient, every parameter counted once, and clipping to it.

ZeRO's and the half-precision optimizers have this done by DeepSpeed. Without ZeRO in fp32 it is done here: DeepSpeed
reports no norm then, and over pipeline stages it leaves out what only later ones hold.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.tensor import split_of


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
