"""NVIDIA Apex's operations: norms and RoPE in CUDA, in float32 alone.

In smaller types its norms round before the weight and its RoPE rounds cos and sin. Built from source with its CUDA
extensions, which it looks for at the first step; here they are looked for when this file is imported. Read at commits
014f30f (norms) and 8b19c3f (RoPE); never run by us.
"""

import importlib

import torch
from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm_affine
from apex.transformer.functional.fused_rope import fused_apply_rotary_pos_emb_cached

from megatron_ring.kernels.rope import Rotation

for _extension in ("fused_layer_norm_cuda", "fused_rotary_positional_embedding"):
    importlib.import_module(_extension)


def norm(
    x_BlE: torch.Tensor, weight_E: torch.Tensor, bias_E: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """All in float32."""
    if bias_E is None:
        return fused_rms_norm_affine(x_BlE, weight_E, weight_E.shape, eps=epsilon)
    return fused_layer_norm_affine(x_BlE, weight_E, bias_E, weight_E.shape, eps=epsilon)


def rope(
    q_BlHD: torch.Tensor, k_BlGD: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor]:
    """It takes tokens first, and the angles of one sequence twice; samples that number theirs apart become one."""
    angles = [
        torch.cat([x, x], dim=-1).flatten(0, -2)[:, None, None]
        for x in (rotation.cos_lP, rotation.sin_lP)
    ]
    apart = rotation.cos_lP.dim() == 3
    return _turned(q_BlHD, *angles, apart), _turned(k_BlGD, *angles, apart)


def _turned(
    x_BlHD: torch.Tensor, cos_N11D: torch.Tensor, sin_N11D: torch.Tensor, apart: bool
) -> torch.Tensor:
    if apart:
        x_N1HD = x_BlHD.flatten(0, 1).unsqueeze(1)
        return fused_apply_rotary_pos_emb_cached(x_N1HD, cos_N11D, sin_N11D).view(x_BlHD.shape)
    # Transposed in memory, so that it is contiguous once it is transposed back.
    return fused_apply_rotary_pos_emb_cached(
        x_BlHD.transpose(0, 1), cos_N11D, sin_N11D, True
    ).transpose(0, 1)
