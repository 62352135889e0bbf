"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba, Kiros and Hinton 2016), made by one call.

Both are torch's. Given bfloat16 they take the statistics, scale and shift in float32 and round once, on the way out;
a test holds them to that.
"""

from collections.abc import Callable

from torch import nn

_NORMS: dict[str, Callable[..., nn.Module]] = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}


def norm(normalization: str, size: int, epsilon: float) -> nn.Module:
    """A module x_BlE -> x_BlE that normalises the last dim: a weight of ``size``, and for LayerNorm a bias.

    ``epsilon`` is added to the mean square (RMSNorm) or to the variance (LayerNorm) before the root.
    """
    return _NORMS[normalization](size, eps=epsilon)
