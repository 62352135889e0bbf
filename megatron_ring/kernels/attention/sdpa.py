"""One hop through torch's own fused attention: its flash kernel on a CPU, on CUDA that and the memory-efficient one.

On CUDA whole rectangles and triangles go to the flash kernel (bf16, fp16) and everything else to the memory-efficient
one.
"""

import torch

from megatron_ring.kernels.attention import torch_cpu, torch_efficient, torch_flash
from megatron_ring.kernels.attention.runs import KeyRuns
from megatron_ring.kernels.attention.state import RunningSoftmax
from megatron_ring.kernels.attention.tiled import Tiled
from megatron_ring.kernels.attention.tiles import TileKind, Tiling

# Measured, docs/log.md: a triangle in tiles of 128 computes 53% of its square, torch's CPU kernel alone up to 62%.
ON_CPU = Tiled(Tiling(rows=128, split_triangles=True), lambda tile: torch_cpu)
_WHOLE = Tiling(rows=1024, split_triangles=False)
ON_CUDA = Tiled(_WHOLE, lambda tile: torch_efficient if tile.kind is TileKind.MASKED else torch_flash)
ON_CUDA_IN_FLOAT32 = Tiled(_WHOLE, lambda tile: torch_efficient)


def forward(
    q_BLHD: torch.Tensor, k_BLGD: torch.Tensor, v_BLGD: torch.Tensor, runs: KeyRuns, scale: float, state: RunningSoftmax
) -> None:
    """Let the queries see their runs of this block of keys; ``state`` is updated in place."""
    _kernel(q_BLHD).forward(q_BLHD, k_BLGD, v_BLGD, runs, scale, state)


def backward(
    dout_BLHD: torch.Tensor,
    q_BLHD: torch.Tensor,
    k_BLGD: torch.Tensor,
    v_BLGD: torch.Tensor,
    out_BLHD: torch.Tensor,
    lse_BHL: torch.Tensor,
    runs: KeyRuns,
    scale: float,
    dq_BLHD: torch.Tensor,
    dk_BLGD: torch.Tensor,
    dv_BLGD: torch.Tensor,
) -> None:
    """Add this block's share to ``dq``, ``dk``, ``dv``. ``out`` and ``lse`` are the final, merged ones."""
    inputs = dout_BLHD, q_BLHD, k_BLGD, v_BLGD, out_BLHD, lse_BHL
    _kernel(q_BLHD).backward(*inputs, runs, scale, dq_BLHD, dk_BLGD, dv_BLGD)


def _kernel(q: torch.Tensor) -> Tiled:
    if q.device.type == "cpu":
        return ON_CPU
    return ON_CUDA if q.dtype in (torch.bfloat16, torch.float16) else ON_CUDA_IN_FLOAT32
