"""One hop with torch's attention operators: the kernels ``sdpa`` and ``cudnn``.

``sdpa`` is this module's functions. It uses the flash operator on a CPU. On CUDA it uses the flash
operator for FULL and CAUSAL tiles in fp16 and bf16, and the memory-efficient one for MASKED tiles,
for float32, and on GPUs below compute capability 8.0, which torch's flash operator refuses.

``cudnn`` uses cuDNN's fused attention, and the memory-efficient operator for what cuDNN does not
take: masked tiles, and tiles of a single query or key. cuDNN makes a plan for every new shape. The
shapes of packed documents differ in every batch, so ``auto`` does not select it for them.
"""

import torch

from megatron_ring.kernels.attention.hop_kernel import GradientAccumulators, HopInputs
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.running_softmax import Output, RunningSoftmax
from megatron_ring.kernels.attention.tiled_kernel import TiledKernel, TileOperator
from megatron_ring.kernels.attention.tiles import Tile, TileKind, Tiling
from megatron_ring.kernels.attention.torch_operators import (
    CPU_FLASH,
    CUDA_EFFICIENT,
    CUDA_FLASH,
    CUDNN,
)
from megatron_ring.kernels.selection import Unsupported


def forward(inputs: HopInputs, state: RunningSoftmax) -> None:
    """As in ``HopKernel``."""
    _kernel(inputs.q_BLHD).forward(inputs, state)


def backward(
    inputs: HopInputs,
    dout_BLHD: torch.Tensor,
    out: Output,
    lse_BHL: torch.Tensor,
    accumulators: GradientAccumulators,
) -> None:
    """As in ``HopKernel``."""
    _kernel(inputs.q_BLHD).backward(inputs, dout_BLHD, out, lse_BHL, accumulators)


def forward_whole(inputs: HopInputs) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As in ``WholeKernel``."""
    return _kernel(inputs.q_BLHD).forward_whole(inputs)


def backward_whole(
    inputs: HopInputs, dout_BLHD: torch.Tensor, out: Output, lse_BHL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """As in ``WholeKernel``."""
    return _kernel(inputs.q_BLHD).backward_whole(inputs, dout_BLHD, out, lse_BHL)


def _kernel(q: torch.Tensor) -> TiledKernel:
    if q.device.type == "cpu":
        return ON_CPU
    is_half_precision = q.dtype in (torch.bfloat16, torch.float16)
    # check_sm_version in torch's sdp_utils.cpp
    has_flash = Machine.here().capability >= (8, 0)
    return ON_CUDA if is_half_precision and has_flash else ON_CUDA_EFFICIENT


def _cuda_operator(tile: Tile) -> TileOperator:
    return CUDA_EFFICIENT if tile.kind is TileKind.MASKED else CUDA_FLASH


def _cudnn_operator(tile: Tile) -> TileOperator:
    several = all(span.stop - span.start > 1 for span in (tile.queries, tile.keys))
    return CUDNN if several and tile.kind is not TileKind.MASKED else CUDA_EFFICIENT


# Measured (docs/log.md): a triangle in tiles of 128 computes 53% of its square, torch's CPU
# operator alone up to 62%. From 768 queries on the operator uses blocks of 256 queries instead of
# 64.
ON_CPU = TiledKernel(Tiling(rows=128, split_triangles=True, tall_rows=768), lambda tile: CPU_FLASH)
_GPU_TILING = Tiling(rows=1024, split_triangles=False)
ON_CUDA = TiledKernel(_GPU_TILING, _cuda_operator)
ON_CUDA_EFFICIENT = TiledKernel(_GPU_TILING, lambda tile: CUDA_EFFICIENT)
WITH_CUDNN = TiledKernel(_GPU_TILING, _cudnn_operator)


def cudnn_unavailable(machine: Machine, head_dim: int, deterministic: bool) -> Unsupported | None:
    """Return why cuDNN cannot run on ``machine``, None if it can.

    The conditions are torch's own (can_use_cudnn_attention in sdp_utils.cpp).
    """
    other_kernel = "Set --attention-kernel sdpa, or auto"
    newer_torch = f"Install a torch for CUDA with cuDNN 9.0 or later. {other_kernel}"
    if machine.cudnn == 0:
        return Unsupported("torch is built without cuDNN", newer_torch)
    if machine.cudnn < 90000:
        version = _cudnn_version(machine.cudnn)
        return Unsupported(f"cuDNN {version} is older than 9.0", newer_torch)
    if too_low := machine.requires_capability((8, 0)):
        return too_low
    if head_dim > 128 and not (machine.capability == (9, 0) and machine.cudnn >= 91000):
        reason = (
            f"it supports head dims up to 128, not {head_dim}; "
            "larger ones require compute capability 9.0 and cuDNN 9.10"
        )
        return Unsupported(reason, other_kernel)
    return None


def _cudnn_version(number: int) -> str:
    """Format torch's version number: 91002 is 9.10.2; before 9.0, 8907 is 8.9.7."""
    major = 10000 if number >= 90000 else 1000
    return f"{number // major}.{number % major // 100}.{number % 100}"
