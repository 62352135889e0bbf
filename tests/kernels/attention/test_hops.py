"""Every kernel over the hops of every layout, with windows and documents, against the oracle."""

import itertools
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import compute_key_ranges
from megatron_ring.kernels.attention import GradientAccumulators, HopInputs, HopKernel
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.running_softmax import RunningSoftmax
from tests import oracle
from tests.fast_kernels import FAST_KERNELS
from tests.tolerances import TOLERANCE, beyond_tolerance

SHORT = [
    Layout("none", 60, 1),
    Layout("ring", 60, 3),
    Layout("striped", 60, 3),
    Layout("striped", 60, 3, stripe_size=4),
    Layout("zigzag", 60, 3),
]

# Longer than a kernel's tile of 128 queries and its blocks of 512 keys.
LONG = [
    Layout("none", 1400, 1),
    Layout("striped", 1400, 2, stripe_size=7),
    Layout("zigzag", 1400, 2),
]

each_kernel = pytest.mark.parametrize("kernel", FAST_KERNELS.values(), ids=FAST_KERNELS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
each_short_layout = pytest.mark.parametrize("layout", SHORT, ids=str)
each_long_layout = pytest.mark.parametrize("layout", LONG, ids=str)


@dataclass(frozen=True)
class Serialized:
    """A kernel that runs in one thread at a time.

    Triton's interpreter replaces parts of its language while it runs a kernel, so ranks that are
    threads must not run it together.
    """

    kernel: HopKernel
    lock: Any = field(default_factory=threading.Lock)

    def forward(self, *arguments) -> None:
        with self.lock:
            self.kernel.forward(*arguments)

    def backward(self, *arguments) -> None:
        with self.lock:
            self.kernel.backward(*arguments)


def window(tokens: int, width: int) -> torch.Tensor:
    """Return the first visible position of each position with a sliding window."""
    return torch.arange(tokens) - width + 1


def documents(tokens: int, *lengths: int) -> torch.Tensor:
    """Return the first visible position of each position in repeated documents of these lengths."""
    first_visible = []
    start = 0
    for length in itertools.cycle(lengths):
        if start >= tokens:
            return torch.tensor(first_visible[:tokens])
        first_visible += [start] * length
        start += length


def hop_by_hop(
    layout: Layout, kernel: HopKernel, first_visible: torch.Tensor, q, k, v, dout
) -> oracle.Attention:
    """Compute what a ring computes, one rank after another and without communication."""
    scale = q.shape[-1] ** -0.5
    shards = [layout.positions(ring_rank) for ring_rank in range(layout.ring_size)]
    whole = RunningSoftmax.empty(q)
    dq, dk, dv = (torch.zeros_like(x, dtype=whole.out_BLHD.dtype) for x in (q, k, v))
    for own in shards:
        own_q, own_dout, own_dq = q[:, own], dout[:, own], dq[:, own]
        state = RunningSoftmax.empty(own_q)
        hops = []
        for source in shards:
            key_ranges = compute_key_ranges(own, source, first_visible[own])
            hops.append(HopInputs(own_q, k[:, source], v[:, source], key_ranges, scale))
        for inputs in hops:
            kernel.forward(inputs, state)
        out, lse = state.out_BLHD.to(q.dtype), state.lse_BHL
        for source, inputs in zip(shards, hops):
            accumulators = GradientAccumulators(own_dq, dk[:, source], dv[:, source])
            kernel.backward(inputs, own_dout, out, lse, accumulators)
            dk[:, source], dv[:, source] = accumulators.dk_BLGD, accumulators.dv_BLGD
        dq[:, own] = own_dq
        whole.out_BLHD[:, own] = out.to(dq.dtype)
        whole.lse_BHL[:, :, own] = lse
    return oracle.Attention(whole.out_BLHD, dq, dk, dv, whole.lse_BHL)


def hop_errors(
    layout: Layout, kernel: HopKernel, first_visible: torch.Tensor, heads: int, groups: int, dtype
) -> dict[str, float]:
    """Return the errors of a kernel, by tensor, that are beyond the tolerance of ``dtype``."""
    inputs = oracle.random_inputs(1, layout.seq_length, heads, groups, dtype)
    position = torch.arange(layout.seq_length)
    visible_SS = (first_visible[:, None] <= position) & (position <= position[:, None])
    results = hop_by_hop(layout, kernel, first_visible, *inputs)
    return beyond_tolerance(results, oracle.attention(*inputs, visible_SS), dtype)


@each_dtype
@each_kernel
@pytest.mark.parametrize("width", [1, 2, 7, 25, 1000])
@each_short_layout
def test_sliding_windows(layout, width, kernel, dtype):
    assert hop_errors(layout, kernel, window(60, width), 4, 2, dtype) == {}


@each_dtype
@each_kernel
@pytest.mark.parametrize("lengths", [(1,), (2, 5, 1), (3, 31), (59, 1), (60,)], ids=str)
@each_short_layout
def test_packed_documents(layout, lengths, kernel, dtype):
    assert hop_errors(layout, kernel, documents(60, *lengths), 4, 2, dtype) == {}


@each_kernel
@each_short_layout
def test_windows_within_documents(layout, kernel):
    first_visible = torch.maximum(window(60, 6), documents(60, 4, 17))
    assert hop_errors(layout, kernel, first_visible, 4, 2, torch.float64) == {}


@each_kernel
@pytest.mark.parametrize(
    "first_visible",
    [window(1400, 100), window(1400, 1000), documents(1400, 800, 5, 130), documents(1400, 127, 1)],
    ids=["window of 100", "window of 1000", "a document of 800", "documents that fill tiles"],
)
@each_long_layout
def test_many_tiles(layout, first_visible, kernel):
    assert hop_errors(layout, kernel, first_visible, 1, 1, torch.float32) == {}


@each_kernel
def test_queries_that_see_nothing_in_any_hop_are_zero(kernel):
    q, k, v, _ = oracle.random_inputs(1, 6, 2, 1)
    lo, hi = torch.tensor([[0, 0], [0, 0], [0, 2], [2, 2], [2, 6], [6, 6]]).T.contiguous()
    state = RunningSoftmax.empty(q)
    kernel.forward(HopInputs(q, k, v, KeyRanges(lo, hi), 0.25), state)
    masked_rows = [0, 1, 3, 5]
    assert (state.out_BLHD[:, masked_rows] == 0).all()
    assert (state.lse_BHL[..., masked_rows] == -torch.inf).all()
    assert state.lse_BHL[..., [2, 4]].isfinite().all()


@each_kernel
def test_gradients_are_added_to_the_buffers(kernel):
    q, k, v, dout = oracle.random_inputs(1, 5, 2, 1)
    key_ranges = compute_key_ranges(torch.arange(5), torch.arange(5))
    inputs = HopInputs(q, k, v, key_ranges, 0.25)
    state = RunningSoftmax.empty(q)
    kernel.forward(inputs, state)
    zeros = GradientAccumulators(*map(torch.zeros_like, (q, k, v)))
    ones = GradientAccumulators(*map(torch.ones_like, (q, k, v)))
    for accumulators in (zeros, ones):
        out, lse = state.out_BLHD, state.lse_BHL
        kernel.backward(inputs, dout, out, lse, accumulators)
    for from_one, from_zero in zip(ones, zeros):
        torch.testing.assert_close(from_one, from_zero + 1)


@each_kernel
def test_inputs_may_be_views(kernel):
    """Queries, keys and values are often slices of one fused projection."""
    generator = torch.Generator().manual_seed(0)
    fused_BLHD = torch.randn(1, 40, 6, 16, dtype=torch.float64, generator=generator)
    q, k, v = fused_BLHD[:, :, :2], fused_BLHD[:, :, 2:4], fused_BLHD[:, :, 4:]
    key_ranges = compute_key_ranges(torch.arange(40), torch.arange(40))
    results = []
    for tensors in ((q, k, v), (q.contiguous(), k.contiguous(), v.contiguous())):
        state = RunningSoftmax.empty(q)
        kernel.forward(HopInputs(*tensors, key_ranges, 0.25), state)
        results.append(state.out_BLHD)
    torch.testing.assert_close(*results)
