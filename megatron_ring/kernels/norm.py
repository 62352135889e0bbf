"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba, Kiros and Hinton 2016): one function, and a module around it.

The function here is torch's. Given bfloat16 it takes the statistics, scale and shift in float32 and rounds once, on the
way out; a test holds it to that. Other libraries' functions of the same signature may take its place (fused/).
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

NormFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]
"""(x_BlE, weight_E, bias_E or None, epsilon) -> (B, l, E) in the type of ``x_BlE``; any number of dims before E."""


def normalize(
    x_BlE: torch.Tensor, weight_E: torch.Tensor, bias_E: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """The last dim normalised, times the weight, plus the bias: LayerNorm if there is a bias, else RMSNorm.

    ``epsilon`` is added to the mean square (RMSNorm) or to the variance (LayerNorm) before the root.
    """
    if bias_E is None:
        return functional.rms_norm(x_BlE, weight_E.shape, weight_E, epsilon)
    return functional.layer_norm(x_BlE, weight_E.shape, weight_E, bias_E, epsilon)


class Norm(nn.Module):
    """x_BlE -> (B, l, E) by ``function``, with a weight of E and, if asked for, a bias of E: the identity at first."""

    def __init__(self, size: int, epsilon: float, bias: bool, function: NormFunction):
        super().__init__()
        self.epsilon = epsilon
        self.function = function
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x_BlE: torch.Tensor) -> torch.Tensor:
        return self.function(x_BlE, self.weight, self.bias, self.epsilon)


def norm(normalization: str, size: int, epsilon: float, function: NormFunction = normalize) -> Norm:
    """The module that ``normalization`` names: RMSNorm, which has no bias, or LayerNorm, which has one."""
    return Norm(size, epsilon, {"RMSNorm": False, "LayerNorm": True}[normalization], function)
