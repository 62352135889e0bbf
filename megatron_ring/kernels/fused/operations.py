"""The operations of a model that may be another library's: a function each, torch's by default.

A library's module beside this one has functions of the same names and signatures. They give torch's numbers within the
tolerances of the tests and need no rank. Forward they write to nothing that they are given but a chunk's logits.
Backward they may write to what is theirs alone by then: the gradient that comes, SwiGLU's gate and up.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_ring.kernels import activation
from megatron_ring.kernels.cross_entropy import CrossEntropy, softmax_cross_entropy
from megatron_ring.kernels.norm import NormFunction, normalize
from megatron_ring.kernels.rope import Rotation, rotate_both


@dataclass(frozen=True)
class Operations:
    """norm: RMSNorm or LayerNorm (norm.py). rope: q_BlHD, k_BlGD, turned by a rotation (rope.py).

    swiglu: silu(gate_BlF) * up_BlF (activation.py). cross_entropy: of a chunk's logits (cross_entropy.py).
    """

    norm: NormFunction = normalize
    rope: Callable[[torch.Tensor, torch.Tensor, Rotation], tuple[torch.Tensor, torch.Tensor]] = (
        rotate_both
    )
    swiglu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = activation.swiglu
    cross_entropy: CrossEntropy = softmax_cross_entropy


TORCH = Operations()
"""All by torch, on any device and in any type."""
