"""The interface of an attention kernel: one hop, forward and backward."""

from typing import Protocol

import torch

from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.running_softmax import Output, RunningSoftmax


class HopKernel(Protocol):
    """Attention of a rank's queries over the keys of one shard, without communication.

    Shapes: q, out (batch, queries, heads, head dim); k, v (batch, keys, key-value heads, head dim).
    A module with these two functions is a kernel. To add one: write its file, add an entry to
    ``KERNEL_SPECS`` in registry.py, and test it with tests/kernels/attention/test_hops.py.
    """

    def forward(
        self,
        q_BLHD: torch.Tensor,
        k_BLGD: torch.Tensor,
        v_BLGD: torch.Tensor,
        key_ranges: KeyRanges,
        scale: float,
        state: RunningSoftmax,
    ) -> None:
        """Attend to the visible keys of this shard, and update ``state`` in place."""

    def backward(
        self,
        dout_BLHD: torch.Tensor,
        q_BLHD: torch.Tensor,
        k_BLGD: torch.Tensor,
        v_BLGD: torch.Tensor,
        out: Output,
        lse_BHL: torch.Tensor,
        key_ranges: KeyRanges,
        scale: float,
        dq_BLHD: torch.Tensor,
        dk_BLGD: torch.Tensor,
        dv_BLGD: torch.Tensor,
    ) -> None:
        """Add this hop's contribution to ``dq``, ``dk`` and ``dv``, float32 or for float64 float64.

        ``out`` and ``lse`` are final, that is merged over all hops. ``out`` is out_BLHD or a
        ``KnownDelta`` instead of it; ``delta_of`` and ``output_of`` of running_softmax.py read
        either.
        """
