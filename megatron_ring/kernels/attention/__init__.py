"""Attention of one hop: queries at hand, visiting keys, a mask in runs, a running softmax to continue.

Every kernel has the two functions of ``HopKernel`` and sees tensors and a mask, never a rank. ``KERNELS`` names them;
``choose`` settles ``--attention-kernel`` and says why.
"""

from typing import NamedTuple, Protocol

import torch

from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.attention import reference, sdpa
from megatron_ring.kernels.attention.runs import KeyRuns
from megatron_ring.kernels.attention.state import RunningSoftmax


class HopKernel(Protocol):
    """Shapes: q, out (batch, queries, heads, head size); k, v (batch, keys, key-value heads, head size)."""

    def forward(
        self,
        q_BLHD: torch.Tensor,
        k_BLGD: torch.Tensor,
        v_BLGD: torch.Tensor,
        runs: KeyRuns,
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
        out_BLHD: torch.Tensor,
        lse_BHL: torch.Tensor,
        runs: KeyRuns,
        scale: float,
        dq_BLHD: torch.Tensor,
        dk_BLGD: torch.Tensor,
        dv_BLGD: torch.Tensor,
    ) -> None:
        """Add this block's share to the float32 gradients, from the final, merged ``out`` and ``lse``."""


KERNELS: dict[str, HopKernel] = {"sdpa": sdpa, "reference": reference}


class KernelChoice(NamedTuple):
    name: str
    reason: str


def choose(asked: str, device_type: str, dtype: torch.dtype, head_dim: int) -> KernelChoice:
    """The kernel for ``--attention-kernel asked``; raises KernelUnavailable when a named one cannot serve."""
    missing = sdpa.unavailable(device_type, dtype, head_dim)
    if asked == "auto":
        if missing:
            return KernelChoice("reference", f"sdpa cannot serve here: {missing}")
        return KernelChoice("sdpa", f"torch's fused attention, the fastest on {device_type} in {dtype}")
    if asked == "sdpa" and missing:
        raise KernelUnavailable(
            f"attention_kernel sdpa cannot serve: {missing}. Set --attention-kernel auto or reference."
        )
    return KernelChoice(asked, "asked for")
