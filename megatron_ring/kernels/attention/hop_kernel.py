"""The interface of an attention kernel: one hop, forward and backward."""

from typing import Any, NamedTuple, Protocol

import torch

from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.running_softmax import Output, RunningSoftmax


class HopInputs(NamedTuple):
    """What both passes of a hop read: queries, the keys and values of one shard, and the mask.

    Shapes: q (batch, queries, heads, head dim); k, v (batch, keys, key-value heads, head dim).
    """

    q_BLHD: torch.Tensor
    k_BLGD: torch.Tensor
    v_BLGD: torch.Tensor
    key_ranges: KeyRanges
    scale: float


class GradientAccumulators(NamedTuple):
    """Buffers to which a hop's gradients are added in place; float32, or for float64 float64."""

    dq_BLHD: torch.Tensor
    dk_BLGD: torch.Tensor
    dv_BLGD: torch.Tensor


class HopKernel(Protocol):
    """Attention of a rank's queries over the keys of one shard, without communication.

    A module with these two functions is a kernel. It may also have those of ``WholeKernel``. To add
    one: write its file, add an entry to ``KERNEL_SPECS`` in registry.py, and test it with
    tests/kernels/attention/test_hops.py.
    """

    def forward(self, inputs: HopInputs, state: RunningSoftmax) -> None:
        """Attend to the visible keys of this shard, and update ``state`` in place."""

    def backward(
        self,
        inputs: HopInputs,
        dout_BLHD: torch.Tensor,
        out: Output,
        lse_BHL: torch.Tensor,
        accumulators: GradientAccumulators,
    ) -> None:
        """Add this hop's contribution to the gradients of q, k and v.

        ``out`` and ``lse`` are final, that is merged over all hops. ``out`` is out_BLHD, of the
        shape of q, or a ``FinalOutput`` or ``KnownDelta`` instead of it; ``delta_of`` and
        ``output_of`` of running_softmax.py read each of them.

        ``torch.are_deterministic_algorithms_enabled()`` requires a fixed order of additions.
        """


class WholeKernel(Protocol):
    """Optional functions of a kernel for a ring of one hop, whose results need no accumulation.

    Both return None where the hop takes more than one call of the kernel's operator. Else the
    results are in the dtype of the inputs, as the operator writes them: there is no float32 state
    to initialise, to add to and to cast.
    """

    def forward_whole(self, inputs: HopInputs) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return out_BLHD and lse_BHL."""

    def backward_whole(
        self, inputs: HopInputs, dout_BLHD: torch.Tensor, out: Output, lse_BHL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return dq_BLHD, dk_BLGD and dv_BLGD."""


def call_whole(kernel: HopKernel, name: str, *arguments: Any) -> Any:
    """Call the function ``name`` of ``WholeKernel``; None if ``kernel`` does not have it."""
    function = getattr(kernel, name, None)
    return function(*arguments) if function else None
