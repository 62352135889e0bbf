"""Liger-Kernel's operations (Hsu et al. 2024): kernels in Triton, from version 0.8.5 on.

Before it, LayerNorm kept the mean in the input's type for backward (up to 0.8.3) and RoPE took no angles that are half
as many as a head's elements. On CUDA these have not been run by us; Triton's interpreter has.
"""

import torch
from liger_kernel.ops import (
    LigerLayerNormFunction,
    LigerRMSNormFunction,
    LigerRopeFunction,
    LigerSiLUMulFunction,
    cross_entropy_forward,
)

from megatron_ring.kernels.cross_entropy import WHOLE, VocabularyPart
from megatron_ring.kernels.fused.targets import within_rows
from megatron_ring.kernels.rope import Rotation


def norm(
    x_BlE: torch.Tensor, weight_E: torch.Tensor, bias_E: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """``gemma`` has all in float32, rounded once; ``llama``, the default, rounds before the weight."""
    if bias_E is not None:
        return LigerLayerNormFunction.apply(x_BlE, weight_E, bias_E, epsilon)
    offset, casting_mode, in_place = (
        0.0,
        "gemma",
        False,
    )  # in place would write to the gradient that it is given
    return LigerRMSNormFunction.apply(x_BlE, weight_E, epsilon, offset, casting_mode, in_place)


def rope(
    q_BlHD: torch.Tensor, k_BlGD: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Products in float32, because cos and sin are.

    It turns in place and no operator says so: --recompute selective would keep turned products and turn them again.
    So copies are turned.
    """
    q_BHlD, k_BGlD = (x.clone().transpose(1, 2) for x in (q_BlHD, k_BlGD))
    angles = rotation.cos_lP, rotation.sin_lP
    turned = LigerRopeFunction.apply(q_BHlD, k_BGlD, *angles, None, 1, q_BlHD.shape[-1])
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)


def swiglu(gate_BlF: torch.Tensor, up_BlF: torch.Tensor) -> torch.Tensor:
    """silu rounded, then the product, as torch's. Backward writes the gradients over gate and up, which ends them."""
    return LigerSiLUMulFunction.apply(gate_BlF, up_BlF)


def cross_entropy(
    logits_cv: torch.Tensor,
    target_c1: torch.Tensor,
    part: VocabularyPart,
    ignore_index: int,
    wants_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In float32, for it adds up losses in the type of the logits. It waits for the device, to look at the targets."""
    assert part is WHOLE, "support.py refuses a split vocabulary"
    target_c, fault = within_rows(target_c1, logits_cv.shape[1], ignore_index)
    dtype, logits_cv = logits_cv.dtype, logits_cv.detach().float().requires_grad_(wants_gradient)
    loss, *_, dlogits_cv = cross_entropy_forward(
        logits_cv,
        target_c,
        weight=None,
        ignore_index=ignore_index,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="sum",
        softcap=None,
        return_z_loss=False,
    )
    return loss + fault, dlogits_cv.detach().to(dtype) if wants_gradient else None
