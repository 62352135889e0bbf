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

from megatron_ring.kernels.memory_contract import UNRESTRICTED, Memory, VendorOperator
from megatron_ring.kernels.rope import Rotation

for _extension in ("fused_layer_norm_cuda", "fused_rotary_positional_embedding"):
    importlib.import_module(_extension)

# The norms copy what is not contiguous (normalization/fused_layer_norm.py). RoPE's kernel reads all
# strides of queries and keys, but cos and sin as dense (tokens, head dim) from their addresses
# (csrc/megatron/fused_rotary_positional_embedding.h).
_NORM_MEMORY = {"input": UNRESTRICTED, "weight": UNRESTRICTED, "bias": UNRESTRICTED}
_RMS_NORM = VendorOperator("Apex's RMSNorm", fused_rms_norm_affine, _NORM_MEMORY)
_LAYER_NORM = VendorOperator("Apex's LayerNorm", fused_layer_norm_affine, _NORM_MEMORY)
_ANGLES = Memory(dense=(0, 1, 2, 3))
_ROPE = VendorOperator(
    "Apex's RoPE",
    fused_apply_rotary_pos_emb_cached,
    {"t": UNRESTRICTED, "cos_": _ANGLES, "sin_": _ANGLES},
)


def norm(
    x_BlE: torch.Tensor, weight_E: torch.Tensor, bias_E: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """RMSNorm without a bias, else LayerNorm; computed in float32."""
    if bias_E is None:
        return _RMS_NORM(input=x_BlE, weight=weight_E, normalized_shape=weight_E.shape, eps=epsilon)
    return _LAYER_NORM(
        input=x_BlE, weight=weight_E, bias=bias_E, normalized_shape=weight_E.shape, eps=epsilon
    )


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
        return _ROPE(t=x_N1HD, cos_=cos_N11D, sin_=sin_N11D).view(x_BlHD.shape)
    rotated_lBHD = _ROPE(
        t=x_BlHD.transpose(0, 1),
        cos_=cos_N11D,
        sin_=sin_N11D,
        transpose_output_memory=True,  # the result is contiguous after transposing back
    )
    return rotated_lBHD.transpose(0, 1)
