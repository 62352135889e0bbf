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

ResidualNormFunction = Callable[
    [torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None, float],
    tuple[torch.Tensor, torch.Tensor],
]
"""(x_BlE, added_BlE or None, weight_E, bias_E or None, epsilon) -> (x + added, its norm).

Without ``added`` the first result is x. Both have gradients.
"""


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


class ResidualNorm(Norm):
    """The norm of a block's input on the residual stream, with the residual add before it.

    It returns the stream as well: backward can then add the stream's gradient in the norm's pass.
    """

    def __init__(
        self,
        size: int,
        epsilon: float,
        bias: bool,
        function: NormFunction,
        residual_function: ResidualNormFunction | None,
    ):
        super().__init__(size, epsilon, bias, function)
        self.residual_function = residual_function

    def forward(
        self, x_BlE: torch.Tensor, added_BlE: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (B, l, E) twice: x + added, and its norm."""
        if self.residual_function is not None:
            return self.residual_function(x_BlE, added_BlE, self.weight, self.bias, self.epsilon)
        total_BlE = x_BlE if added_BlE is None else x_BlE + added_BlE
        return total_BlE, super().forward(total_BlE)


def norm(normalization: str, size: int, epsilon: float, function: NormFunction = normalize) -> Norm:
    """Create the module for ``normalization``: RMSNorm without a bias, or LayerNorm with one."""
    return Norm(size, epsilon, _HAS_BIAS[normalization], function)


def residual_norm(
    normalization: str,
    size: int,
    epsilon: float,
    function: NormFunction = normalize,
    residual_function: ResidualNormFunction | None = None,
) -> ResidualNorm:
    """Create the module of a norm with the residual add before it, alike."""
    return ResidualNorm(size, epsilon, _HAS_BIAS[normalization], function, residual_function)


_HAS_BIAS = {"RMSNorm": False, "LayerNorm": True}
