"""Triton's kernel in Triton's interpreter, in tiles so small that short hops have skipped, whole and straddling ones.

The interpreter is right for float32 and wrong for products of bfloat16, so the kernel upcasts them there: what is held
against the oracle is the kernel's arithmetic and its masks, not a GPU's.
"""

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, key_runs
from megatron_ring.kernels.attention import triton
from megatron_ring.kernels.attention.runs import KeyRanges
from megatron_ring.kernels.attention.state import RunningSoftmax
from megatron_ring.kernels.attention.triton import blocks
from tests import oracle, simulated_ring
from tests.kernels.attention.one_at_a_time import OneAtATime
from tests.kernels.attention.test_hops import SHORT, documents, mistakes, window
from tests.tolerances import beyond_tolerance

SMALL = blocks.Blocks(16, 16, warps=4, stages=1)
KERNELS = "forward", "queries", "keys"


@pytest.fixture
def small_tiles(monkeypatch):
    for kernel in KERNELS:
        monkeypatch.setitem(blocks.TABLE["ampere"], kernel, {256: SMALL})


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", [SHORT[0], SHORT[2]], ids=str)
@pytest.mark.parametrize(
    "first_visible", [window(60, 60), documents(60, 40, 2, 5, 1)], ids=["causal", "documents"]
)
def test_hops(layout, first_visible):
    assert mistakes(layout, triton, first_visible, 2, 1, torch.bfloat16) == {}


@pytest.mark.whole
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "first_visible",
    [
        window(60, 60),
        window(60, 7),
        documents(60, 40, 2, 5, 1),
        torch.maximum(window(60, 6), documents(60, 4, 17)),
    ],
    ids=["causal", "a window", "documents", "windows within documents"],
)
@pytest.mark.parametrize("layout", SHORT, ids=str)
def test_hops_of_every_layout(layout, first_visible):
    assert mistakes(layout, triton, first_visible, 2, 1, torch.bfloat16) == {}


@pytest.mark.whole
@pytest.mark.parametrize(
    "first_visible",
    [window(1400, 1400), window(1400, 100), documents(1400, 800, 5, 130)],
    ids=["causal", "window", "documents"],
)
def test_tiles_of_the_size_that_gpus_get(first_visible):
    assert mistakes(Layout("striped", 1400, 2), triton, first_visible, 1, 1, torch.float32) == {}


PACK = oracle.documents(2, 60, (13, 1, 46))
MASKS = {
    "causal": (Mask(), oracle.documents(2, 60, (60,))),
    "a window": (Mask(window=11), oracle.documents(2, 60, (60,))),
    "documents": (
        Mask(document_starts=tuple(oracle.document_starts(PACK).tolist()), samples=2),
        PACK,
    ),
}


@pytest.mark.whole
@pytest.mark.parametrize(("ring_size", "mask"), [(4, "causal"), (3, "a window"), (2, "documents")])
def test_rings(ring_size, mask):
    """The state goes from hop to hop, the sums travel with their keys; grouped heads, and a gradient of lse."""
    inputs, (given, document_BS) = oracle.random_inputs(2, 60, 4, 2, torch.bfloat16), MASKS[mask]
    dlse = oracle.random_dlse(inputs[0])
    layout = Layout("striped", 60, ring_size)
    found = simulated_ring.run(
        layout, OneAtATime(triton), *inputs, mask=given, dlse_BHS=dlse
    ).results
    expected = oracle.attention(*inputs, oracle.visible(document_BS, given.window), dlse)
    assert beyond_tolerance(found, expected, torch.bfloat16) == {}


def test_queries_that_see_nothing_keep_what_they_had():
    q, k, v, dout = oracle.random_inputs(1, 6, 2, 1, torch.float32)
    lo, hi = torch.tensor([[0, 0], [0, 0], [0, 2], [2, 2], [2, 6], [6, 6]]).T.contiguous()
    state = RunningSoftmax.empty(q)
    triton.forward(q, k, v, KeyRanges(lo, hi), 0.25, state)
    blind = [0, 1, 3, 5]
    assert (state.out_BLHD[:, blind] == 0).all()
    assert (state.lse_BHL[..., blind] == -torch.inf).all()
    assert state.lse_BHL[..., [2, 4]].isfinite().all()
    gradients = [torch.zeros_like(x) for x in (q, k, v)]
    triton.backward(
        dout, q, k, v, state.out_BLHD, state.lse_BHL, KeyRanges(lo, hi), 0.25, *gradients
    )
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, blind] == 0).all()


def test_gradients_are_added_to_what_is_there():
    q, k, v, dout = oracle.random_inputs(1, 5, 2, 1, torch.float32)
    runs, state = key_runs(torch.arange(5), torch.arange(5)), RunningSoftmax.empty(q)
    triton.forward(q, k, v, runs, 0.25, state)
    sums = [[torch.full_like(x, begun) for x in (q, k, v)] for begun in (0.0, 1.0)]
    for gradients in sums:
        triton.backward(dout, q, k, v, state.out_BLHD, state.lse_BHL, runs, 0.25, *gradients)
    for from_zero, from_one in zip(*sums):
        torch.testing.assert_close(from_one, from_zero + 1)


def test_sums_may_be_some_heads_of_larger_ones():
    q, k, v, dout = oracle.random_inputs(2, 20, 4, 2, torch.float32)
    runs, state = key_runs(torch.arange(20), torch.arange(20)), RunningSoftmax.empty(q)
    triton.forward(q, k, v, runs, 0.25, state)
    at_once, in_halves = ([torch.zeros_like(x) for x in (q, k, v)] for _ in range(2))
    triton.backward(dout, q, k, v, state.out_BLHD, state.lse_BHL, runs, 0.25, *at_once)
    for heads, groups in (slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 2)):
        rows = [x[:, :, heads] for x in (dout, q)], [x[:, :, groups] for x in (k, v)]
        sums = [x[:, :, part] for x, part in zip(in_halves, (heads, groups, groups))]
        out, lse = state.out_BLHD[:, :, heads], state.lse_BHL[:, heads]
        triton.backward(*rows[0], *rows[1], out, lse, runs, 0.25, *sums)
    assert all(torch.equal(x, y) for x, y in zip(at_once, in_halves))


@pytest.mark.parametrize(("head", "larger"), [(64, 64), (65, 128), (96, 128), (256, 256)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_head_sizes_between_take_the_tiles_of_the_next(kernel, head, larger):
    assert blocks.blocks_for(kernel, head, "hopper") == blocks.TABLE["hopper"][kernel][larger]


@pytest.mark.parametrize(
    ("capability", "generation"),
    [
        ((8, 0), "ampere"),
        ((8, 9), "ampere"),
        ((9, 0), "hopper"),
        ((10, 0), "hopper"),
        ((12, 0), "ampere"),
    ],
)
def test_a_gpu_has_the_tiles_that_its_shared_memory_holds(capability, generation, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert blocks.generation_of(torch.device("cuda")) == generation
