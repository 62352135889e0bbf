"""Attention of one hop: a rank's queries over the keys of one shard, continuing a running softmax.

A kernel has the two functions of ``HopKernel`` (hop_kernel.py) and receives tensors and key ranges
(key_ranges.py), never a rank. ``KERNELS`` has them by name, registry.py what each supports, and
``choose`` picks one for ``--attention-kernel`` and gives the reason.
"""

from megatron_ring.kernels.attention.choice import KernelChoice, choose
from megatron_ring.kernels.attention.hop_kernel import (
    GradientAccumulators,
    HopInputs,
    HopKernel,
    call_whole,
)
from megatron_ring.kernels.attention.memory_layout import stack_to_kernel_layout, to_kernel_layout
from megatron_ring.kernels.attention.preferences import stripe_widths
from megatron_ring.kernels.attention.registry import KERNELS

__all__ = [
    "KERNELS",
    "GradientAccumulators",
    "HopInputs",
    "HopKernel",
    "KernelChoice",
    "call_whole",
    "choose",
    "stack_to_kernel_layout",
    "stripe_widths",
    "to_kernel_layout",
]
