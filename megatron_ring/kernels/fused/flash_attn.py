"""flash-attn's operations (Dao 2023) from version 2.8.3 on: in Triton, and for SwiGLU in CUDA.

Signatures and dtypes were read in 2.8.3. In earlier versions RoPE's angles had to have the queries'
dtype. Its norms time several numbers of warps on their first run. We have not run any of it on
CUDA.
"""

import torch
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.ops.activations import swiglu as _swiglu
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

from megatron_ring.kernels.cross_entropy import WHOLE, VocabularyPart
from megatron_ring.kernels.fused.operations import ignore_invalid_targets
from megatron_ring.kernels.memory_contract import UNRESTRICTED, Memory, VendorOperator
from megatron_ring.kernels.rope import Rotation

# flash-attn copies what is not contiguous before its kernels see it: norms their rows, weight and
# bias (ops/triton/layer_norm.py), RoPE its angles, whose kernel reads all strides of queries and
# keys (ops/triton/rotary.py). SwiGLU is an element-wise kernel of torch's iterator
# (ops/activations.py). Cross entropy copies rows of logits, but reads the labels from their address
# (ops/triton/cross_entropy.py).
_NORM_MEMORY = {"x": UNRESTRICTED, "weight": UNRESTRICTED, "bias": UNRESTRICTED}
_RMS_NORM = VendorOperator("flash-attn's RMSNorm", rms_norm_fn, _NORM_MEMORY)
_LAYER_NORM = VendorOperator("flash-attn's LayerNorm", layer_norm_fn, _NORM_MEMORY)
_ROPE = VendorOperator(
    "flash-attn's RoPE", apply_rotary_emb, dict.fromkeys(("x", "cos", "sin"), UNRESTRICTED)
)
# It is an autograd function's apply, which takes no names.
_SWIGLU = VendorOperator(
    "flash-attn's SwiGLU",
    lambda **arguments: _swiglu(*arguments.values()),
    dict.fromkeys(("x", "y"), UNRESTRICTED),
)
_CROSS_ENTROPY = VendorOperator(
    "flash-attn's cross entropy",
    cross_entropy_loss,
    {"logits": UNRESTRICTED, "labels": Memory(dense=(0,))},
)


def norm(
    x_BlE: torch.Tensor, weight_E: torch.Tensor, bias_E: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """RMSNorm without a bias, else LayerNorm; computed in float32 and rounded once."""
    operator = _RMS_NORM if bias_E is None else _LAYER_NORM
    return operator(x=x_BlE, weight=weight_E, bias=bias_E, eps=epsilon)


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
        return _ROPE(x=x_BlHD, cos=rotation.cos_lP, sin=rotation.sin_lP)
    cos_NP, sin_NP = rotation.cos_lP.flatten(0, 1), rotation.sin_lP.flatten(0, 1)
    rotated_1NHD = _ROPE(x=x_BlHD.flatten(0, 1).unsqueeze(0), cos=cos_NP, sin=sin_NP)
    return rotated_1NHD.view(x_BlHD.shape)


def swiglu(gate_BlF: torch.Tensor, up_BlF: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) * up in float32, rounded once."""
    return _SWIGLU(x=gate_BlF, y=up_BlF)


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
        losses_c, _ = _CROSS_ENTROPY(
            logits=logits_cv, labels=target_c, ignore_index=ignore_index, inplace_backward=True
        )
        loss = losses_c.sum()
    dlogits_cv = torch.autograd.grad(loss, logits_cv)[0].detach() if with_gradient else None
    return loss.detach() + penalty, dlogits_cv
