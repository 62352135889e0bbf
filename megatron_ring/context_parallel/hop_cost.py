"""What a hop costs: the matrix products of its kernel, and the bytes that a rank sends in it.

Products are counted from the mask. Under a contiguous layout, or where documents are short, ranks
have unequal work by design, and the rank that takes longer may be the faster one: times of two
ranks can be compared only per product.

Bytes decide what travels in backward. A rank may send on the keys it has or the queries it has.
Keys carry V, dK and dV; queries carry dO, lse, delta and dQ, for every query head instead of every
key-value head. With equal heads the queries are fewer bytes; with enough query heads per key-value
head the keys are.

The work of a hop differs between ranks where documents are kept apart, so ranks may be some hops
ahead of each other, at the price of buffers.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_ring.kernels.attention import HopInputs, HopKernel, call_whole
from megatron_ring.kernels.attention.running_softmax import accumulation_dtype
from megatron_ring.parallel.progress import ProgressTracker

# Matrix products of a visible pair: scores and output; backward: scores again, dP, dQ, dK and dV.
FORWARD_PRODUCTS = 2
BACKWARD_PRODUCTS = 5


def with_work_count(kernel: HopKernel, progress: ProgressTracker) -> HopKernel:
    """Wrap ``kernel`` to add its matrix products to ``progress``, if that accumulates work."""
    return _WorkCountingKernel(kernel, progress) if progress.accumulates_work else kernel


@dataclass(frozen=True)
class _WorkCountingKernel:
    kernel: HopKernel
    progress: ProgressTracker

    def forward(self, inputs: HopInputs, *rest) -> None:
        self.progress.add_products(FORWARD_PRODUCTS * _visible_pairs(inputs))
        self.kernel.forward(inputs, *rest)

    def backward(self, inputs: HopInputs, *rest) -> None:
        self.progress.add_products(BACKWARD_PRODUCTS * _visible_pairs(inputs))
        self.kernel.backward(inputs, *rest)

    def forward_whole(self, inputs: HopInputs) -> Any:
        return self._call_whole("forward_whole", FORWARD_PRODUCTS, inputs)

    def backward_whole(self, inputs: HopInputs, *rest) -> Any:
        return self._call_whole("backward_whole", BACKWARD_PRODUCTS, inputs, *rest)

    def _call_whole(self, name: str, products: int, inputs: HopInputs, *rest) -> Any:
        results = call_whole(self.kernel, name, inputs, *rest)
        if results is not None:
            self.progress.add_products(products * _visible_pairs(inputs))
        return results


def _visible_pairs(inputs: HopInputs) -> int:
    """Return the visible pairs of all samples and of this call's heads, which may be a subset."""
    samples, _, heads, _ = inputs.q_BLHD.shape
    return samples * heads * inputs.key_ranges.visible_pairs


def backward_bytes(q_BLHD: torch.Tensor, kv_2BLGD: torch.Tensor) -> dict[str, int]:
    """Return the bytes a rank sends in one hop of backward if the keys or the queries travel."""
    accumulator_size = accumulation_dtype(q_BLHD.dtype).itemsize
    rows = q_BLHD.shape[:-1].numel()
    return {
        "keys": kv_2BLGD.numel() * (kv_2BLGD.itemsize + accumulator_size),
        "queries": (
            q_BLHD.numel() * (2 * q_BLHD.itemsize + accumulator_size) + rows * 2 * accumulator_size
        ),
    }


def exchanges_in_flight(hops: int) -> int:
    """Return how many hops ahead the exchanges of a ring with direct messages (direct.py) start.

    As many hops may a rank be ahead of those that it exchanges with. Each needs buffers of up to a
    shard, which are small where there are many hops: those added to send are at most a 32nd of the
    sample, as are those added to receive, and as much is added for returning gradients. Fewer
    than 32 hops gain nothing by a second exchange (docs/decisions/0029).
    """
    return 1 + hops // 32


def direct_buffers(hops: int, in_flight: int) -> int:
    """Return the buffers, sent and received together, of what travels in direct.py.

    As many more are for the gradients that go back. A ring of few hops starts fewer exchanges than
    might be in flight.
    """
    exchanges = hops - 1
    return min(in_flight, exchanges) + min(in_flight + 1, exchanges)


def queries_are_lighter(q_BLHD: torch.Tensor, kv_2BLGD: torch.Tensor) -> bool:
    """Return whether sending the queries takes fewer bytes than sending the keys.

    That is so below 4/3 query heads per key-value head in float32, and below 3/2 in bfloat16, both
    without the bytes of lse and delta.
    """
    sent = backward_bytes(q_BLHD, kv_2BLGD)
    return sent["queries"] < sent["keys"]
