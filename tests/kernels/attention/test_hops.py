"""Every kernel over the hops of every layout, with windows and packed documents, against the oracle's dense mask."""

import itertools

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import key_runs
from megatron_ring.kernels.attention import HopKernel
from megatron_ring.kernels.attention.runs import KeyRanges
from megatron_ring.kernels.attention.state import RunningSoftmax
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


def window(tokens: int, width: int) -> torch.Tensor:
    """The first position that each position sees through a window."""
    return torch.arange(tokens) - width + 1


def documents(tokens: int, *lengths: int) -> torch.Tensor:
    """The first position that each position sees in documents of these lengths, over and over."""
    spans = zip(itertools.accumulate(itertools.cycle(lengths), initial=0), itertools.cycle(lengths))
    starts = (start for start, length in spans for _ in range(length))
    return torch.tensor(list(itertools.islice(starts, tokens)))


def hop_by_hop(
    layout: Layout, kernel: HopKernel, first_visible: torch.Tensor, q, k, v, dout
) -> oracle.Attention:
    """What a ring computes, rank after rank and without any communication."""
    scale, shards = (
        q.shape[-1] ** -0.5,
        [layout.positions(ring_rank) for ring_rank in range(layout.ring_size)],
    )
    whole = RunningSoftmax.empty(q)
    dq, dk, dv = (torch.zeros_like(x, dtype=whole.out_BLHD.dtype) for x in (q, k, v))
    for at in shards:
        hops = [(source, key_runs(at, source, first_visible[at])) for source in shards]
        own_q, own_dout, own_dq, state = (
            q[:, at],
            dout[:, at],
            dq[:, at],
            RunningSoftmax.empty(q[:, at]),
        )
        for source, runs in hops:
            kernel.forward(own_q, k[:, source], v[:, source], runs, scale, state)
        out, lse = state.out_BLHD.to(q.dtype), state.lse_BHL
        for source, runs in hops:
            own_dk, own_dv = dk[:, source], dv[:, source]
            kernel.backward(
                own_dout,
                own_q,
                k[:, source],
                v[:, source],
                out,
                lse,
                runs,
                scale,
                own_dq,
                own_dk,
                own_dv,
            )
            dk[:, source], dv[:, source] = own_dk, own_dv
        dq[:, at], whole.out_BLHD[:, at], whole.lse_BHL[:, :, at] = own_dq, out.to(dq.dtype), lse
    return oracle.Attention(whole.out_BLHD, dq, dk, dv, whole.lse_BHL)


def mistakes(
    layout: Layout, kernel: HopKernel, first_visible: torch.Tensor, heads: int, groups: int, dtype
):
    inputs = oracle.random_inputs(1, layout.seq_length, heads, groups, dtype)
    p = torch.arange(layout.seq_length)
    visible_SS = (first_visible[:, None] <= p) & (p <= p[:, None])
    return beyond_tolerance(
        hop_by_hop(layout, kernel, first_visible, *inputs),
        oracle.attention(*inputs, visible_SS),
        dtype,
    )


@each_dtype
@each_kernel
@pytest.mark.parametrize("width", [1, 2, 7, 25, 1000])
@each_short_layout
def test_sliding_windows(layout, width, kernel, dtype):
    assert mistakes(layout, kernel, window(60, width), 4, 2, dtype) == {}


@each_dtype
@each_kernel
@pytest.mark.parametrize("lengths", [(1,), (2, 5, 1), (3, 31), (59, 1), (60,)], ids=str)
@each_short_layout
def test_packed_documents(layout, lengths, kernel, dtype):
    assert mistakes(layout, kernel, documents(60, *lengths), 4, 2, dtype) == {}


@each_kernel
@each_short_layout
def test_windows_within_documents(layout, kernel):
    first_visible = torch.maximum(window(60, 6), documents(60, 4, 17))
    assert mistakes(layout, kernel, first_visible, 4, 2, torch.float64) == {}


@each_kernel
@pytest.mark.parametrize(
    "first_visible",
    [window(1400, 100), window(1400, 1000), documents(1400, 800, 5, 130), documents(1400, 127, 1)],
    ids=["window of 100", "window of 1000", "a document of 800", "documents that fill tiles"],
)
@each_long_layout
def test_many_tiles(layout, first_visible, kernel):
    assert mistakes(layout, kernel, first_visible, 1, 1, torch.float32) == {}


@each_kernel
def test_queries_that_see_nothing_in_any_hop_are_zero(kernel):
    q, k, v, _ = oracle.random_inputs(1, 6, 2, 1)
    lo, hi = torch.tensor([[0, 0], [0, 0], [0, 2], [2, 2], [2, 6], [6, 6]]).T
    state = RunningSoftmax.empty(q)
    kernel.forward(q, k, v, KeyRanges(lo.contiguous(), hi.contiguous()), 0.25, state)
    blind = [0, 1, 3, 5]
    assert (state.out_BLHD[:, blind] == 0).all()
    assert (state.lse_BHL[..., blind] == -torch.inf).all()
    assert state.lse_BHL[..., [2, 4]].isfinite().all()


@each_kernel
def test_gradients_are_added_to_what_is_there(kernel):
    q, k, v, dout = oracle.random_inputs(1, 5, 2, 1)
    runs, state = key_runs(torch.arange(5), torch.arange(5)), RunningSoftmax.empty(q)
    kernel.forward(q, k, v, runs, 0.25, state)
    fresh = [torch.zeros_like(x) for x in (q, k, v)]
    begun = [torch.ones_like(x) for x in (q, k, v)]
    for gradients in (fresh, begun):
        kernel.backward(dout, q, k, v, state.out_BLHD, state.lse_BHL, runs, 0.25, *gradients)
    for sum_from_one, sum_from_zero in zip(begun, fresh):
        torch.testing.assert_close(sum_from_one, sum_from_zero + 1)


@each_kernel
def test_views_are_as_good_as_contiguous_tensors(kernel):
    """Queries, keys and values are often slices of one fused projection."""
    fused_BLHD = torch.randn(
        1, 40, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    q, k, v = fused_BLHD[:, :, :2], fused_BLHD[:, :, 2:4], fused_BLHD[:, :, 4:]
    runs, results = key_runs(torch.arange(40), torch.arange(40)), []
    for inputs in ((q, k, v), (q.contiguous(), k.contiguous(), v.contiguous())):
        state = RunningSoftmax.empty(q)
        kernel.forward(*inputs, runs, 0.25, state)
        results.append(state.out_BLHD)
    torch.testing.assert_close(*results)
