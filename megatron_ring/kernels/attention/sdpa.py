"""One hop through torch's own fused attention: its flash kernel on a CPU, on CUDA that and the memory-efficient one.

On CUDA whole rectangles and triangles go to the flash kernel (bf16, fp16) and everything else to the memory-efficient
one.
"""

import torch

from megatron_ring.kernels.attention import torch_cpu, torch_efficient, torch_flash
from megatron_ring.kernels.attention.tiled import Tiled
from megatron_ring.kernels.attention.tiles import TileKind, Tiling

# Measured, docs/log.md: a triangle in tiles of 128 computes 53% of its square, torch's CPU kernel alone up to 62%. From
# 768 queries on it takes them in blocks of 256 instead of 64.
ON_CPU = Tiled(Tiling(rows=128, split_triangles=True, tall=768), lambda tile: torch_cpu)
_WHOLE = Tiling(rows=1024, split_triangles=False)
ON_CUDA = Tiled(
    _WHOLE, lambda tile: torch_efficient if tile.kind is TileKind.MASKED else torch_flash
)
ON_CUDA_IN_FLOAT32 = Tiled(_WHOLE, lambda tile: torch_efficient)


def forward(q_BLHD: torch.Tensor, *rest) -> None:
    """As in ``HopKernel``."""
    _kernel(q_BLHD).forward(q_BLHD, *rest)


def backward(dout_BLHD: torch.Tensor, q_BLHD: torch.Tensor, *rest) -> None:
    """As in ``HopKernel``."""
    _kernel(q_BLHD).backward(dout_BLHD, q_BLHD, *rest)


def _kernel(q: torch.Tensor) -> Tiled:
    if q.device.type == "cpu":
        return ON_CPU
    return ON_CUDA if q.dtype in (torch.bfloat16, torch.float16) else ON_CUDA_IN_FLOAT32
