"""The model's operations that other libraries can replace: one function each, torch's by default.

The modules of the libraries (triton/, liger.py, flash_attn.py, apex.py) have functions with these
names and signatures. They match torch's numbers within the tolerances of the tests and do not
depend on a rank. Forward they write only to a chunk's logits. Backward they may overwrite what
nothing else needs any more: the incoming gradient, and SwiGLU's gate and up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_ring.kernels import activation
from megatron_ring.kernels.cross_entropy import CrossEntropy, softmax_cross_entropy
from megatron_ring.kernels.norm import NormFunction, ResidualNormFunction, normalize
from megatron_ring.kernels.rope import Rotation, rotate_both

RopeAndPack = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Rotation],
    tuple[torch.Tensor, torch.Tensor, torch.Tensor],
]


@dataclass(frozen=True)
class Operations:
    """The functions a model calls.

    norm: RMSNorm or LayerNorm (norm.py). rope: rotates q_BlHD and k_BlGD (rope.py).
    swiglu: silu(gate_BlF) * up_BlF (activation.py).
    cross_entropy: that of a chunk's logits (cross_entropy.py).
    residual_norm: the residual add and ``norm`` in one (norm.py); None: one after the other.
    rope_and_pack: ``rope`` of q_BlHD and k_BlGD that returns keys, and v_BlGD, as halves of one
        tensor, so that the ring sends them without a copy; None: ``rope``.
    sums_in_products: whether matrix products add up the gradients that several projections have
        for their common input, which are rounded less often then.
    """

    norm: NormFunction = normalize
    rope: Callable[[torch.Tensor, torch.Tensor, Rotation], tuple[torch.Tensor, torch.Tensor]] = (
        rotate_both
    )
    swiglu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = activation.swiglu
    cross_entropy: CrossEntropy = softmax_cross_entropy
    residual_norm: ResidualNormFunction | None = None
    rope_and_pack: RopeAndPack | None = None
    sums_in_products: bool = False

    def rotate(
        self, q_BlHD: torch.Tensor, k_BlGD: torch.Tensor, v_BlGD: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rotated queries and keys, and the values."""
        if self.rope_and_pack is not None:
            return self.rope_and_pack(q_BlHD, k_BlGD, v_BlGD, rotation)
        return *self.rope(q_BlHD, k_BlGD, rotation), v_BlGD


TORCH = Operations()
"""All operations by torch, on any device and in any dtype."""


def ignore_invalid_targets(
    target_c1: torch.Tensor, rows: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace targets outside the vocabulary, for libraries that would read a logit out of bounds.

    Returns target_c with ``ignore_index`` in their place, and what to add to the loss: infinity if
    there are any, else 0. Nothing is copied to the host.
    """
    target_c = target_c1.flatten()
    invalid_c = (target_c != ignore_index) & ((target_c < 0) | (target_c >= rows))
    penalty = torch.where(invalid_c.any(), math.inf, 0.0)
    return torch.where(invalid_c, ignore_index, target_c), penalty
