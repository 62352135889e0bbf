"""Our own kernels in Triton, for what a layer computes between attention and matrix products.

Each reads its inputs from memory once and writes its results once, in forward and in backward:
RMSNorm with the residual add before it, RoPE of queries and keys with the packing of keys and
values for the ring, and SwiGLU. ``python -m benchmarks.count_elementwise`` counts the bytes beside
the least possible. The tests run the kernels in Triton's interpreter and compile them for sm_80 and
sm_90; they have not run on a GPU.
"""

import torch

from megatron_ring.kernels.fused.triton.norm_kernels import AddRMSNorm
from megatron_ring.kernels.fused.triton.rope_kernel import RopeAndPack
from megatron_ring.kernels.fused.triton.swiglu_kernels import swiglu
from megatron_ring.kernels.rope import Rotation

__all__ = ["norm", "residual_norm", "rope_and_pack", "swiglu"]


def norm(x_BlE: torch.Tensor, weight_E: torch.Tensor, bias_E: None, epsilon: float) -> torch.Tensor:
    """RMSNorm, computed in float32 and rounded once."""
    return residual_norm(x_BlE, None, weight_E, bias_E, epsilon)[1]


def residual_norm(
    x_BlE: torch.Tensor,
    added_BlE: torch.Tensor | None,
    weight_E: torch.Tensor,
    bias_E: None,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + added and its RMSNorm (``ResidualNormFunction``), each rounded once."""
    assert bias_E is None, "libraries.py refuses LayerNorm"
    return AddRMSNorm.apply(x_BlE, added_BlE, weight_E, epsilon)


def rope_and_pack(
    q_BlHD: torch.Tensor, k_BlGD: torch.Tensor, v_BlGD: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate queries and keys; rotated keys and values are the halves of one tensor."""
    return RopeAndPack.apply(q_BlHD, k_BlGD, v_BlGD, rotation.cos_lP, rotation.sin_lP)
