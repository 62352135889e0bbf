"""flash-attn's operations (Dao 2023), which are kernels in Triton and for SwiGLU in CUDA, from version 2.8.3 on.

Signatures and types were read in 2.8.3; in earlier versions RoPE's angles had to be of the queries' type. Its norms
time several numbers of warps when they first run. None of it has been run on CUDA by us.
"""

import torch
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.ops.activations import swiglu
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

from megatron_ring.kernels.cross_entropy import WHOLE, VocabularyPart
from megatron_ring.kernels.fused.targets import within_rows
from megatron_ring.kernels.rope import Rotation

__all__ = ["cross_entropy", "norm", "rope", "swiglu"]


def norm(
    x_BlE: torch.Tensor, weight_E: torch.Tensor, bias_E: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """All in float32, rounded once."""
    function = rms_norm_fn if bias_E is None else layer_norm_fn
    return function(x_BlE, weight_E, bias_E, eps=epsilon)


def rope(
    q_BlHD: torch.Tensor, k_BlGD: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Products in float32. Its angles are those of one sequence, so samples that number theirs apart become one."""
    return _turned(q_BlHD, rotation), _turned(k_BlGD, rotation)


def _turned(x_BlHD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    if rotation.cos_lP.dim() == 2:
        return apply_rotary_emb(x_BlHD, rotation.cos_lP, rotation.sin_lP)
    one_1NHD = x_BlHD.flatten(0, 1).unsqueeze(0)
    turned_1NHD = apply_rotary_emb(
        one_1NHD, rotation.cos_lP.flatten(0, 1), rotation.sin_lP.flatten(0, 1)
    )
    return turned_1NHD.view(x_BlHD.shape)


def cross_entropy(
    logits_cv: torch.Tensor,
    target_c1: torch.Tensor,
    part: VocabularyPart,
    ignore_index: int,
    wants_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses in float32, the gradient rounded once, over the logits."""
    assert part is WHOLE, "support.py refuses a split vocabulary"
    target_c, fault = within_rows(target_c1, logits_cv.shape[1], ignore_index)
    with torch.set_grad_enabled(wants_gradient):
        logits_cv = logits_cv.detach().requires_grad_(wants_gradient)
        losses_c, _ = cross_entropy_loss(
            logits_cv, target_c, ignore_index=ignore_index, inplace_backward=True
        )
        loss = losses_c.sum()
    dlogits_cv = torch.autograd.grad(loss, logits_cv)[0].detach() if wants_gradient else None
    return loss.detach() + fault, dlogits_cv
