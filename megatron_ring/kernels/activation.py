"""The activation of a feed-forward, elementwise and in the dtype of its input: SwiGLU or GELU."""

import torch
from torch.nn import functional


def swiglu(gate_BlF: torch.Tensor, up_BlF: torch.Tensor) -> torch.Tensor:
    """SwiGLU: gate * sigmoid(gate) * up, (B, l, F).

    Shazeer 2020, GLU Variants Improve Transformer, equation 6.
    """
    return functional.silu(gate_BlF) * up_BlF


def gelu(x_BlF: torch.Tensor) -> torch.Tensor:
    """GELU in GPT-2's tanh form: x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))).

    Hendrycks and Gimpel 2016, section 2.
    """
    return functional.gelu(x_BlF, approximate="tanh")
