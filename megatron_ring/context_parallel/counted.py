"""How much work a hop is, counted from its mask: only with it can one rank's time be held against another's.

Under a contiguous ring, or where documents are short, ranks have unequal work by design, and who takes longer may be
the faster one.
"""

from dataclasses import dataclass

import torch

from megatron_ring.kernels.attention import HopKernel
from megatron_ring.kernels.attention.runs import KeyRanges
from megatron_ring.parallel.progress import ProgressTracker

# Matrix products of a visible pair: scores and output; backward the scores again, dP, dQ, dK and dV.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def counted(kernel: HopKernel, place: ProgressTracker) -> HopKernel:
    """``kernel``, telling ``place`` how much it multiplies where that is added up."""
    return _Counted(kernel, place) if place.adds_work_up else kernel


@dataclass(frozen=True)
class _Counted:
    kernel: HopKernel
    place: ProgressTracker

    def forward(self, q_BLHD, k_BLGD, v_BLGD, runs, *rest) -> None:
        self.place.multiplies(FORWARD_PRODUCTS * _pairs(q_BLHD, runs))
        self.kernel.forward(q_BLHD, k_BLGD, v_BLGD, runs, *rest)

    def backward(self, dout_BLHD, q_BLHD, k_BLGD, v_BLGD, out_BLHD, lse_BHL, runs, *rest) -> None:
        self.place.multiplies(BACKWARD_PRODUCTS * _pairs(q_BLHD, runs))
        self.kernel.backward(dout_BLHD, q_BLHD, k_BLGD, v_BLGD, out_BLHD, lse_BHL, runs, *rest)


def _pairs(q_BLHD: torch.Tensor, runs: KeyRanges) -> int:
    """Of every sample and head: a call may be for a few heads."""
    samples, _, heads, _ = q_BLHD.shape
    return samples * heads * runs.visible_pairs
