"""Triton's kernel in Triton's interpreter.

Tiles are so small that short hops have skipped, full and partial ones. The interpreter is correct
for float32 and wrong for products of bfloat16, so the kernel upcasts them there: the tests cover
the kernel's arithmetic and masks, not a GPU's.
"""

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, compute_key_ranges
from megatron_ring.kernels.attention import GradientAccumulators, HopInputs, triton
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.running_softmax import RunningSoftmax
from megatron_ring.kernels.attention.triton import blocks
from tests import oracle, simulated_ring
from tests.kernels.attention.test_hops import SHORT, Serialized, documents, hop_errors, window
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
def test_hops_match_the_oracle(layout, first_visible):
    assert hop_errors(layout, triton, first_visible, 2, 1, torch.bfloat16) == {}


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
def test_hops_of_every_layout_match_the_oracle(layout, first_visible):
    assert hop_errors(layout, triton, first_visible, 2, 1, torch.bfloat16) == {}


@pytest.mark.whole
@pytest.mark.parametrize(
    "first_visible",
    [window(1400, 1400), window(1400, 100), documents(1400, 800, 5, 130)],
    ids=["causal", "window", "documents"],
)
def test_tiles_of_the_size_used_on_gpus_match_the_oracle(first_visible):
    assert hop_errors(Layout("striped", 1400, 2), triton, first_visible, 1, 1, torch.float32) == {}


PACK = oracle.documents(2, 60, (13, 1, 46))
PACK_MASK = Mask(document_starts=tuple(oracle.document_starts(PACK).tolist()), samples=2)
MASKS = {
    "causal": (Mask(), oracle.documents(2, 60, (60,))),
    "a window": (Mask(window=11), oracle.documents(2, 60, (60,))),
    "documents": (PACK_MASK, PACK),
}


@pytest.mark.whole
@pytest.mark.parametrize(
    ("ring_size", "mask_name"), [(4, "causal"), (3, "a window"), (2, "documents")]
)
def test_rings_match_the_oracle(ring_size, mask_name):
    """The state continues over hops, and gradients travel; grouped heads and a gradient of lse."""
    inputs = oracle.random_inputs(2, 60, 4, 2, torch.bfloat16)
    mask, document_BS = MASKS[mask_name]
    dlse = oracle.random_dlse(inputs[0])
    layout = Layout("striped", 60, ring_size)
    results = simulated_ring.run(
        layout, Serialized(triton), *inputs, mask=mask, dlse_BHS=dlse
    ).results
    expected = oracle.attention(*inputs, oracle.visible(document_BS, mask.window), dlse)
    assert beyond_tolerance(results, expected, torch.bfloat16) == {}


def test_queries_that_see_nothing_keep_their_state():
    q, k, v, dout = oracle.random_inputs(1, 6, 2, 1, torch.float32)
    lo, hi = torch.tensor([[0, 0], [0, 0], [0, 2], [2, 2], [2, 6], [6, 6]]).T.contiguous()
    inputs = HopInputs(q, k, v, KeyRanges(lo, hi), 0.25)
    state = RunningSoftmax.empty(q)
    triton.forward(inputs, state)
    masked_rows = [0, 1, 3, 5]
    assert (state.out_BLHD[:, masked_rows] == 0).all()
    assert (state.lse_BHL[..., masked_rows] == -torch.inf).all()
    assert state.lse_BHL[..., [2, 4]].isfinite().all()
    gradients = GradientAccumulators(*map(torch.zeros_like, (q, k, v)))
    out, lse = state.out_BLHD, state.lse_BHL
    triton.backward(inputs, dout, out, lse, gradients)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][:, masked_rows] == 0).all()


def test_gradients_are_added_to_the_buffers():
    q, k, v, dout = oracle.random_inputs(1, 5, 2, 1, torch.float32)
    key_ranges = compute_key_ranges(torch.arange(5), torch.arange(5))
    inputs = HopInputs(q, k, v, key_ranges, 0.25)
    state = RunningSoftmax.empty(q)
    triton.forward(inputs, state)
    zeros = GradientAccumulators(*map(torch.zeros_like, (q, k, v)))
    ones = GradientAccumulators(*map(torch.ones_like, (q, k, v)))
    for accumulators in (zeros, ones):
        out, lse = state.out_BLHD, state.lse_BHL
        triton.backward(inputs, dout, out, lse, accumulators)
    for from_zero, from_one in zip(zeros, ones):
        torch.testing.assert_close(from_one, from_zero + 1)


def test_gradient_buffers_may_be_some_heads_of_larger_ones():
    q, k, v, dout = oracle.random_inputs(2, 20, 4, 2, torch.float32)
    key_ranges = compute_key_ranges(torch.arange(20), torch.arange(20))
    inputs = HopInputs(q, k, v, key_ranges, 0.25)
    state = RunningSoftmax.empty(q)
    triton.forward(inputs, state)
    at_once, in_halves = (GradientAccumulators(*map(torch.zeros_like, (q, k, v))) for _ in range(2))
    out, lse = state.out_BLHD, state.lse_BHL
    triton.backward(inputs, dout, out, lse, at_once)
    for heads, groups in ((slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 2))):
        parts = (heads, groups, groups)
        half = HopInputs(*(x[:, :, part] for x, part in zip((q, k, v), parts)), key_ranges, 0.25)
        accumulators = GradientAccumulators(*(x[:, :, part] for x, part in zip(in_halves, parts)))
        triton.backward(half, dout[:, :, heads], out[:, :, heads], lse[:, heads], accumulators)
    assert all(torch.equal(x, y) for x, y in zip(at_once, in_halves))


@pytest.mark.parametrize(("head_dim", "row"), [(64, 64), (65, 128), (96, 128), (256, 256)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_head_dim_uses_the_next_row_of_the_table(kernel, head_dim, row):
    assert blocks.blocks_for(kernel, head_dim, "hopper") == blocks.TABLE["hopper"][kernel][row]


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
def test_a_gpu_uses_tiles_that_fit_its_shared_memory(capability, generation, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert blocks.generation_of(torch.device("cuda")) == generation
