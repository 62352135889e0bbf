"""Times of a rank's hops, one after another on one device and without messages."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.common import compute_seconds, gpu_milliseconds
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, hop_key_ranges
from megatron_ring.context_parallel.visible_rows import are_sent_directly
from megatron_ring.kernels.attention import GradientAccumulators, HopInputs, HopKernel
from megatron_ring.kernels.attention.running_softmax import (
    FinalOutput,
    RunningSoftmax,
    zero_accumulators,
)
from megatron_ring.plan.ring_timeline import keys_of_hop


@dataclass(frozen=True)
class HopTimes:
    """Sums over some hops: their number, visible pairs, and seconds forward and backward."""

    hops: float = 0
    pairs: float = 0
    forward: float = 0
    backward: float = 0

    @property
    def seconds(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "HopTimes") -> "HopTimes":
        return HopTimes(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def __mul__(self, factor: float) -> "HopTimes":
        return HopTimes(*(value * factor for value in vars(self).values()))


def time_rank(
    kernel: HopKernel,
    tensors: list[torch.Tensor],
    layout: Layout,
    rank: int,
    mask: Mask,
    rounds: int,
) -> HopTimes:
    """Time the hops of one rank, each as the median of ``rounds`` after a warm-up.

    All hops use the same ``tensors``, which are q, k, v and the gradient of the output, and
    continue one softmax. Of a ring of more than 8 ranks a sample of hops stands for all, except
    with documents, whose hops differ.
    """
    size = layout.ring_size
    q, k, v, dout = tensors
    scale = q.shape[-1] ** -0.5
    state = RunningSoftmax.empty(q)
    accumulators = GradientAccumulators(*map(zero_accumulators, (q, k, v)))

    def median_seconds(run: Callable[[], None]) -> float:
        run()
        return statistics.median(_seconds(run, q.device.type) for _ in range(rounds))

    def time_hop(hop: int) -> HopTimes:
        key_ranges = hop_key_ranges(layout, rank, keys_of_hop(layout, mask, rank, hop), mask)
        if are_sent_directly(layout, mask) and key_ranges.visible_pairs == 0:
            return HopTimes(1, 0, 0.0, 0.0)  # not computed (context_parallel/direct.py)
        inputs = HopInputs(q, k, v, key_ranges, scale)
        forward = median_seconds(lambda: kernel.forward(inputs, state))
        out = FinalOutput.of(state.out_BLHD.to(q.dtype), dout)
        lse = state.lse_BHL
        backward = median_seconds(lambda: kernel.backward(inputs, dout, out, lse, accumulators))
        return HopTimes(1, key_ranges.visible_pairs, forward, backward)

    first = time_hop(0)
    if size == 1:
        return first
    hops = range(1, size) if mask.document_starts else _sample_of_hops(size)
    others = [time_hop(hop) for hop in hops]
    return first + sum(others, HopTimes()) * ((size - 1) / len(others))


def _seconds(run: Callable[[], None], device_type: str) -> float:
    """Return the seconds of one run; on a CPU those of this process, whatever else runs."""
    if device_type != "cuda":
        return compute_seconds(run, device_type)
    return gpu_milliseconds(run) / 1e3


def _sample_of_hops(ring_size: int) -> Sequence[int]:
    """Return the hops after the first that are timed: all of them, or four of a large ring."""
    if ring_size <= 8:
        return range(1, ring_size)
    return [1 + (ring_size - 2) * i // 3 for i in range(4)]
