"""flash-attn's operations (Dao 2023) from version 2.8.3 on: in Triton, and for SwiGLU in CUDA.

Signatures and dtypes were read in 2.8.3. In earlier versions RoPE's angles had to have the queries'
dtype. Its norms time several numbers of warps on their first run. We have not run any of it on
CUDA.
"""

import torch
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.ops.activations import swiglu
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

from megatron_ring.kernels.cross_entropy import WHOLE, VocabularyPart
from megatron_ring.kernels.fused.operations import ignore_invalid_targets
from megatron_ring.kernels.rope import Rotation

__all__ = ["cross_entropy", "norm", "rope", "swiglu"]


def norm(
    x_BlE: torch.Tensor, weight_E: torch.Tensor, bias_E: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """RMSNorm without a bias, else LayerNorm; computed in float32 and rounded once."""
    function = rms_norm_fn if bias_E is None else layer_norm_fn
    return function(x_BlE, weight_E, bias_E, eps=epsilon)


def rope(
    q_BlHD: torch.Tensor, k_BlGD: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys, with products in float32.

    flash-attn takes the angles of one sequence. Samples with positions of their own are passed as
    one long sequence.
    """
    return _rotate(q_BlHD, rotation), _rotate(k_BlGD, rotation)


def _rotate(x_BlHD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    if rotation.cos_lP.dim() == 2:
        return apply_rotary_emb(x_BlHD, rotation.cos_lP, rotation.sin_lP)
    cos_NP, sin_NP = rotation.cos_lP.flatten(0, 1), rotation.sin_lP.flatten(0, 1)
    rotated_1NHD = apply_rotary_emb(x_BlHD.flatten(0, 1).unsqueeze(0), cos_NP, sin_NP)
    return rotated_1NHD.view(x_BlHD.shape)


def cross_entropy(
    logits_cv: torch.Tensor,
    target_c1: torch.Tensor,
    part: VocabularyPart,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Implement CrossEntropy with losses in float32; the gradient overwrites the logits."""
    assert part is WHOLE, "libraries.py refuses a split vocabulary"
    target_c, penalty = ignore_invalid_targets(target_c1, logits_cv.shape[1], ignore_index)
    with torch.set_grad_enabled(with_gradient):
        logits_cv = logits_cv.detach().requires_grad_(with_gradient)
        losses_c, _ = cross_entropy_loss(
            logits_cv, target_c, ignore_index=ignore_index, inplace_backward=True
        )
        loss = losses_c.sum()
    dlogits_cv = torch.autograd.grad(loss, logits_cv)[0].detach() if with_gradient else None
    return loss.detach() + penalty, dlogits_cv
