"""Attention of one hop: queries at hand, visiting keys, a mask in runs, a running softmax to continue.

Every kernel has the two functions of ``HopKernel`` and sees tensors and a mask, never a rank. ``KERNELS`` names them;
``choose`` settles ``--attention-kernel`` by the tables of support.py and measured.py and says why.
"""

import importlib.util
from typing import Protocol

import torch

from megatron_ring.kernels.attention import cudnn, flash, reference, sdpa
from megatron_ring.kernels.attention.choice import KernelChoice, choose
from megatron_ring.kernels.attention.preferences import (
    stack_to_kernel_layout,
    stripe_widths,
    to_kernel_layout,
)
from megatron_ring.kernels.attention.runs import KeyRanges
from megatron_ring.kernels.attention.state import Output, RunningSoftmax

__all__ = [
    "KERNELS",
    "HopKernel",
    "KernelChoice",
    "choose",
    "stack_to_kernel_layout",
    "stripe_widths",
    "to_kernel_layout",
]


class HopKernel(Protocol):
    """Shapes: q, out (batch, queries, heads, head size); k, v (batch, keys, key-value heads, head size)."""

    def forward(
        self,
        q_BLHD: torch.Tensor,
        k_BLGD: torch.Tensor,
        v_BLGD: torch.Tensor,
        runs: KeyRanges,
        scale: float,
        state: RunningSoftmax,
    ) -> None:
        """Let the queries see their runs of this block of keys; ``state`` is updated in place."""

    def backward(
        self,
        dout_BLHD: torch.Tensor,
        q_BLHD: torch.Tensor,
        k_BLGD: torch.Tensor,
        v_BLGD: torch.Tensor,
        out: Output,
        lse_BHL: torch.Tensor,
        runs: KeyRanges,
        scale: float,
        dq_BLHD: torch.Tensor,
        dk_BLGD: torch.Tensor,
        dv_BLGD: torch.Tensor,
    ) -> None:
        """Add this block's share to the float32 gradients.

        ``out`` and ``lse`` are the final, merged ones. ``out`` is out_BLHD, or a ``KnownDelta`` in
        its place; ``state.delta_of`` and ``state.output_of`` read either.
        """


KERNELS: dict[str, HopKernel] = {
    "flash": flash,
    "cudnn": cudnn.KERNEL,
    "sdpa": sdpa,
    "reference": reference,
}
if importlib.util.find_spec("triton"):
    from megatron_ring.kernels.attention import triton

    KERNELS["triton"] = triton
