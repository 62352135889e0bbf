"""What stands between the two matrices of a feed-forward: SwiGLU or GELU, element by element, in the dtype given."""

import torch
from torch.nn import functional


def swiglu(gate_BlF: torch.Tensor, up_BlF: torch.Tensor) -> torch.Tensor:
    """gate * sigmoid(gate) * up (Shazeer 2020, GLU Variants Improve Transformer, equation 6): (B, l, F)."""
    return functional.silu(gate_BlF) * up_BlF


def gelu(x_BlF: torch.Tensor) -> torch.Tensor:
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), GPT-2's form (Hendrycks and Gimpel 2016, section 2)."""
    return functional.gelu(x_BlF, approximate="tanh")
