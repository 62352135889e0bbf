"""The ring loop: keys and values travel, each rank computes on those at hand, and results merge by log-sum-exp.

Ring Attention (Liu, Zaharia and Abbeel 2023, section 3, algorithm 1). One loop forward and one backward serve every
layout: which keys a hop's queries see comes from the mask, what computes it from the kernel, how tensors travel from
the exchange. No layout, device or library is named here, and nothing in a hop waits but for the keys of the next.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import hop_runs
from megatron_ring.kernels.attention import HopKernel
from megatron_ring.kernels.attention.state import RunningSoftmax, accumulation_dtype


class Transfer(Protocol):
    """A tensor on its way to the next rank, and its like on the way from the previous one."""

    def wait(self) -> torch.Tensor:
        """What the previous rank sent; the tensor that was sent may be reused from now on."""


class Exchange(Protocol):
    """How a rank passes a tensor on. Every rank of a ring starts the same exchanges in the same order."""

    def start(self, tensor: torch.Tensor) -> Transfer:
        """Send ``tensor`` to the next rank of the ring and receive its like from the previous; returns at once."""


@dataclass(frozen=True)
class Ring:
    """One rank's place in a ring, and what it computes with."""

    layout: Layout
    ring_rank: int
    kernel: HopKernel
    scale: float
    exchange: Exchange | None  # None where the ring has one member: there is nobody to send to

    def source(self, hop: int) -> int:
        """The ring rank whose keys visit in ``hop``. Our own come first, so that no row starts with nothing."""
        return (self.ring_rank - hop) % self.layout.ring_size

    def sends(self, hop: int) -> bool:
        """Whether the keys of ``hop`` travel on: R - 1 times around is enough, the last need not come home."""
        return hop < self.layout.ring_size - 1


def forward(q_BLHD: torch.Tensor, kv_2BLGD: torch.Tensor, ring: Ring) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact causal attention of this rank's queries over the whole sequence.

    ``kv_2BLGD`` holds K and V, contiguous, so that they travel as one message. Returns the output in q's type and
    the log-sum-exp (batch, heads, L) in float32 (float64 for float64). R - 1 exchanges.
    """
    state = RunningSoftmax.empty(q_BLHD)
    for hop in range(ring.layout.ring_size):
        travelling = ring.exchange.start(kv_2BLGD) if ring.sends(hop) else None
        runs = hop_runs(ring.layout, ring.ring_rank, ring.source(hop))
        ring.kernel.forward(q_BLHD, kv_2BLGD[0], kv_2BLGD[1], runs, ring.scale, state)
        if travelling:
            kv_2BLGD = travelling.wait()
    return state.out_BLHD.to(q_BLHD.dtype), state.lse_BHL


def backward(
    dout_BLHD: torch.Tensor,
    q_BLHD: torch.Tensor,
    kv_2BLGD: torch.Tensor,
    out_BLHD: torch.Tensor,
    lse_BHL: torch.Tensor,
    ring: Ring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (dq, dkv) of ``forward``, in the accumulation type: float32, or float64 for float64.

    K and V go around again; the sum of their gradients follows one hop behind, each rank adding its share when its
    own is computed, and is home after R hops. R - 1 exchanges of K and V, R of their gradients.
    """
    dtype = accumulation_dtype(q_BLHD.dtype)
    dq_BLHD = torch.zeros_like(q_BLHD, dtype=dtype, memory_format=torch.contiguous_format)
    gradients_behind = None
    for hop in range(ring.layout.ring_size):
        travelling = ring.exchange.start(kv_2BLGD) if ring.sends(hop) else None
        runs = hop_runs(ring.layout, ring.ring_rank, ring.source(hop))
        dkv_2BLGD = torch.zeros_like(kv_2BLGD, dtype=dtype)
        ring.kernel.backward(
            dout_BLHD, q_BLHD, kv_2BLGD[0], kv_2BLGD[1], out_BLHD, lse_BHL, runs, ring.scale,
            dq_BLHD, dkv_2BLGD[0], dkv_2BLGD[1],
        )  # fmt: skip
        if gradients_behind:
            dkv_2BLGD += gradients_behind.wait()
        if ring.exchange:
            gradients_behind = ring.exchange.start(dkv_2BLGD)
        if travelling:
            kv_2BLGD = travelling.wait()
    return dq_BLHD, gradients_behind.wait() if gradients_behind else dkv_2BLGD
