"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba, Kiros and Hinton 2016).

The function here is torch's. For bfloat16 inputs it computes statistics, scale and shift in float32
and rounds once, at the end; a test checks that. Other libraries' functions of the same signature
can replace it (fused/).
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

NormFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]
"""(x_BlE, weight_E, bias_E or None, epsilon) -> (B, l, E) in the dtype of x; any dims before E."""


def normalize(
    x_BlE: torch.Tensor, weight_E: torch.Tensor, bias_E: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """Normalise the last dim, multiply by the weight and add the bias.

    With a bias it is LayerNorm, without one RMSNorm. ``epsilon`` is added to the mean square
    (RMSNorm) or to the variance (LayerNorm) before the root.
    """
    if bias_E is None:
        return functional.rms_norm(x_BlE, weight_E.shape, weight_E, epsilon)
    return functional.layer_norm(x_BlE, weight_E.shape, weight_E, bias_E, epsilon)


class Norm(nn.Module):
    """A norm of the last dim, (B, l, E) -> (B, l, E), with a weight and optionally a bias.

    It starts without scale and shift: the weight with ones, the bias with zeros.
    """

    def __init__(self, size: int, epsilon: float, bias: bool, function: NormFunction):
        super().__init__()
        self.epsilon = epsilon
        self.function = function
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x_BlE: torch.Tensor) -> torch.Tensor:
        return self.function(x_BlE, self.weight, self.bias, self.epsilon)


def norm(normalization: str, size: int, epsilon: float, function: NormFunction = normalize) -> Norm:
    """Create the module for ``normalization``: RMSNorm without a bias, or LayerNorm with one."""
    has_bias = {"RMSNorm": False, "LayerNorm": True}[normalization]
    return Norm(size, epsilon, has_bias, function)
