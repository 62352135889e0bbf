"""NVIDIA Apex's operations: norms and RoPE in CUDA, only in float32.

In smaller dtypes its norms round before the weight is applied, and its RoPE rounds cos and sin.
Apex is built from source with its CUDA extensions, which it loads at the first step; importing this
module loads them, so that a missing one is found before. Read at commits 014f30f (norms) and
8b19c3f (RoPE); we have never run it.
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
    """RMSNorm without a bias, else LayerNorm; computed in float32."""
    if bias_E is None:
        return fused_rms_norm_affine(x_BlE, weight_E, weight_E.shape, eps=epsilon)
    return fused_layer_norm_affine(x_BlE, weight_E, bias_E, weight_E.shape, eps=epsilon)


def rope(
    q_BlHD: torch.Tensor, k_BlGD: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys.

    Apex takes the token dimension first, and the angles of one sequence, each twice. Samples with
    positions of their own are passed as one long sequence.
    """
    angles = [
        torch.cat([x, x], dim=-1).flatten(0, -2)[:, None, None]
        for x in (rotation.cos_lP, rotation.sin_lP)
    ]
    per_sample = rotation.cos_lP.dim() == 3
    return _rotate(q_BlHD, *angles, per_sample), _rotate(k_BlGD, *angles, per_sample)


def _rotate(
    x_BlHD: torch.Tensor, cos_N11D: torch.Tensor, sin_N11D: torch.Tensor, per_sample: bool
) -> torch.Tensor:
    if per_sample:
        x_N1HD = x_BlHD.flatten(0, 1).unsqueeze(1)
        return fused_apply_rotary_pos_emb_cached(x_N1HD, cos_N11D, sin_N11D).view(x_BlHD.shape)
    # With transposed memory (the last argument) the result is contiguous after transposing back.
    rotated_lBHD = fused_apply_rotary_pos_emb_cached(
        x_BlHD.transpose(0, 1), cos_N11D, sin_N11D, True
    )
    return rotated_lBHD.transpose(0, 1)
