"""Liger-Kernel's operations (Hsu et al. 2024), Triton kernels, from version 0.8.5 on.

In earlier versions LayerNorm saved the mean for backward in the input's dtype (up to 0.8.3), and
RoPE did not accept angles for half of a head's elements. We have run these in Triton's interpreter,
not on CUDA.
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
from megatron_ring.kernels.fused.operations import ignore_invalid_targets
from megatron_ring.kernels.memory_contract import UNRESTRICTED, VendorOperator
from megatron_ring.kernels.rope import Rotation

# Liger copies what is not contiguous before its kernels, which read few strides, see it: the
# functions of norms and SwiGLU in forward and backward (ensure_contiguous in ops/utils.py), RoPE
# queries, keys and angles (ops/rope.py), cross entropy logits and targets (ops/cross_entropy.py).
_RMS_NORM = VendorOperator(
    "Liger's RMSNorm",
    lambda **arguments: LigerRMSNormFunction.apply(*arguments.values()),
    {"X": UNRESTRICTED, "W": UNRESTRICTED},
)
_LAYER_NORM = VendorOperator(
    "Liger's LayerNorm",
    lambda **arguments: LigerLayerNormFunction.apply(*arguments.values()),
    {"X": UNRESTRICTED, "W": UNRESTRICTED, "B": UNRESTRICTED},
)
_ROPE = VendorOperator(
    "Liger's RoPE",
    lambda **arguments: LigerRopeFunction.apply(*arguments.values()),
    {"q": UNRESTRICTED, "k": UNRESTRICTED, "cos": UNRESTRICTED, "sin": UNRESTRICTED},
)
_SWIGLU = VendorOperator(
    "Liger's SwiGLU",
    lambda **arguments: LigerSiLUMulFunction.apply(*arguments.values()),
    {"a": UNRESTRICTED, "b": UNRESTRICTED},
)
_CROSS_ENTROPY = VendorOperator(
    "Liger's cross entropy",
    cross_entropy_forward,
    {"_input": UNRESTRICTED, "target": UNRESTRICTED},
)


def norm(
    x_BlE: torch.Tensor, weight_E: torch.Tensor, bias_E: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """RMSNorm without a bias, else LayerNorm; computed in float32 and rounded once."""
    if bias_E is not None:
        return _LAYER_NORM(X=x_BlE, W=weight_E, B=bias_E, eps=epsilon)
    return _RMS_NORM(
        X=x_BlE,
        W=weight_E,
        eps=epsilon,
        offset=0.0,
        casting_mode="gemma",  # the default, "llama", rounds before the weight is applied
        in_place=False,  # in place would overwrite the incoming gradient
    )


def rope(
    q_BlHD: torch.Tensor, k_BlGD: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys, with products in float32, because cos and sin are.

    Liger rotates in place, hidden from autograd: --recompute selective would save the rotated
    products and rotate them again. So copies are rotated.
    """
    q_BHlD, k_BGlD = (x.clone().transpose(1, 2) for x in (q_BlHD, k_BlGD))
    rotated = _ROPE(
        q=q_BHlD,
        k=k_BGlD,
        cos=rotation.cos_lP,
        sin=rotation.sin_lP,
        position_ids=None,
        unsqueeze_dim=1,
        rotary_dim=q_BlHD.shape[-1],
    )
    return rotated[0].transpose(1, 2), rotated[1].transpose(1, 2)


def swiglu(gate_BlF: torch.Tensor, up_BlF: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) * up, with silu rounded before the product, as torch does.

    Backward writes the gradients over gate and up, which nothing may read afterwards.
    """
    return _SWIGLU(a=gate_BlF, b=up_BlF)


def cross_entropy(
    logits_cv: torch.Tensor,
    target_c1: torch.Tensor,
    part: VocabularyPart,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Implement CrossEntropy in float32; Liger accumulates losses in the logits' dtype.

    It blocks the host until the device has checked the targets.
    """
    assert part is WHOLE, "libraries.py refuses a split vocabulary"
    target_c, penalty = ignore_invalid_targets(target_c1, logits_cv.shape[1], ignore_index)
    dtype = logits_cv.dtype
    loss, *_, dlogits_cv = _CROSS_ENTROPY(
        _input=logits_cv.detach().float().requires_grad_(with_gradient),
        target=target_c,
        weight=None,
        ignore_index=ignore_index,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="sum",
        softcap=None,
        return_z_loss=False,
    )
    return loss + penalty, dlogits_cv.detach().to(dtype) if with_gradient else None
