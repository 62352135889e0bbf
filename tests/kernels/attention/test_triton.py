"""Triton's kernel in Triton's interpreter.

Tiles are so small that short hops have skipped, full and partial ones. The interpreter is correct
for float32 and wrong for products of bfloat16, so the kernel upcasts them there: the tests cover
the kernel's arithmetic and masks, not a GPU's.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, compute_key_ranges
from megatron_ring.kernels.attention import GradientAccumulators, HopInputs, tile_lists, triton
from megatron_ring.kernels.attention.determinism import deterministic_algorithms
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.registry import Feature, support
from megatron_ring.kernels.attention.running_softmax import RunningSoftmax, zero_accumulators
from megatron_ring.kernels.attention.triton import blocks
from megatron_ring.kernels.selection import Validation
from tests import oracle, simulated_ring
from tests.kernels.attention.test_hops import SHORT, Serialized, documents, hop_errors, window
from tests.tolerances import beyond_tolerance

SMALL = blocks.Blocks(16, 16, warps=4, stages=1)
KERNELS = "forward", "fused", "queries", "keys"


# Head dims that fill a power of two, and that do not; the last has no 16-byte rows.
HEAD_DIMS = 16, 96, 20


@pytest.fixture
def small_tiles(monkeypatch):
    for kernel in KERNELS:
        monkeypatch.setitem(blocks.TABLE["ampere"], kernel, {256: SMALL})


BACKWARD_KERNELS = "fused", "two kernels"


@pytest.fixture(params=BACKWARD_KERNELS)
def backward_kernels(request):
    """Run a test with the fused backward kernel, and with the two deterministic ones."""
    if request.param == "fused":
        yield request.param
        return
    with deterministic_algorithms():
        yield request.param


FIRST_VISIBLE = {
    "causal": window(60, 60),
    "documents": documents(60, 40, 2, 5, 1),
    "a window": window(60, 7),
    "windows within documents": torch.maximum(window(60, 6), documents(60, 4, 17)),
}


def _hop_cases() -> Iterator:
    """Yield every layout and mask with both backward kernels.

    Each layout and mask has one of the two in CI, alternately, and four have it in all runs.
    """
    layouts_and_masks = itertools.product(enumerate(SHORT), enumerate(FIRST_VISIBLE))
    for (i, layout), (j, mask) in layouts_and_masks:
        for turn, kernels in enumerate(BACKWARD_KERNELS):
            marks = [pytest.mark.exhaustive] if (i + j + turn) % 2 else [pytest.mark.whole]
            if i in (0, 2) and j < 2 and marks == [pytest.mark.whole]:
                marks = []
            yield pytest.param(kernels, layout, mask, marks=marks)


@pytest.mark.usefixtures("small_tiles", "backward_kernels")
@pytest.mark.parametrize(
    ("backward_kernels", "layout", "mask"),
    list(_hop_cases()),
    indirect=["backward_kernels"],
    ids=str,
)
def test_hops_match_the_oracle(layout, mask):
    assert hop_errors(layout, triton, FIRST_VISIBLE[mask], 2, 1, torch.bfloat16) == {}


@pytest.mark.whole
@pytest.mark.usefixtures("backward_kernels")
@pytest.mark.parametrize(
    "first_visible",
    [window(1100, 1100), window(1100, 100), documents(1100, 800, 5, 130)],
    ids=["causal", "window", "documents"],
)
def test_tiles_of_the_size_used_on_gpus_match_the_oracle(first_visible):
    assert hop_errors(Layout("striped", 1100, 2), triton, first_visible, 1, 1, torch.float32) == {}


PACK = oracle.documents(2, 60, (13, 1, 46))
PACK_MASK = Mask(document_starts=tuple(oracle.document_starts(PACK).tolist()), samples=2)
MASKS = {
    "causal": (Mask(), oracle.documents(2, 60, (60,))),
    "a window": (Mask(window=11), oracle.documents(2, 60, (60,))),
    "documents": (PACK_MASK, PACK),
}


@pytest.mark.whole
@pytest.mark.usefixtures("backward_kernels")
@pytest.mark.parametrize(
    ("ring_size", "mask_name"), [(4, "causal"), (3, "a window"), (2, "documents")]
)
def test_rings_match_the_oracle(ring_size, mask_name):
    """The state continues over hops, and gradients travel; grouped heads and a gradient of lse."""
    inputs = oracle.random_inputs(2, 60, 2, 1, torch.bfloat16)
    mask, document_BS = MASKS[mask_name]
    dlse = oracle.random_dlse(inputs[0])
    layout = Layout("striped", 60, ring_size)
    results = simulated_ring.run(
        layout, Serialized(triton), *inputs, mask=mask, dlse_BHS=dlse
    ).results
    expected = oracle.attention(*inputs, oracle.visible(document_BS, mask.window), dlse)
    assert beyond_tolerance(results, expected, torch.bfloat16) == {}


@pytest.mark.usefixtures("backward_kernels")
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


@pytest.mark.usefixtures("backward_kernels")
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


@pytest.mark.usefixtures("backward_kernels")
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


@pytest.mark.usefixtures("small_tiles", "backward_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims_and_dtypes_match_the_oracle(head_dim, dtype):
    """Odd lengths, two samples, and four query heads for each key-value head."""
    inputs = oracle.random_inputs(2, 37, 4, 1, dtype, head_dim)
    document_BS = oracle.documents(2, 37, (37,))
    results = attention(*inputs, compute_key_ranges(torch.arange(37), torch.arange(37)))
    expected = oracle.attention(*inputs, oracle.visible(document_BS))
    assert beyond_tolerance(results, expected, dtype) == {}


@pytest.mark.usefixtures("small_tiles", "backward_kernels")
def test_inputs_may_be_views_of_larger_tensors():
    """Some heads are read in place; tensors with other strides are copied."""
    fused_BLHD = torch.randn(2, 37, 9, 16, generator=torch.Generator().manual_seed(0))
    views = fused_BLHD[:, :, :4], fused_BLHD[:, :, 4:5], fused_BLHD[:, :, 5:6]
    dout = torch.randn(2, 4, 37, 16, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    key_ranges = compute_key_ranges(torch.arange(37), torch.arange(37))
    of_views = attention(*views, dout, key_ranges)
    of_copies = attention(*(x.contiguous() for x in (*views, dout)), key_ranges)
    assert all(torch.equal(x, y) for x, y in zip(of_views, of_copies))


def test_some_heads_of_a_tensor_are_not_copied():
    whole = torch.randn(1, 8, 6, 16)
    half = whole[:, :, 2:4]
    assert triton._readable(half) is half
    assert triton._stride_in_heads(half) == 6
    assert triton._readable(whole.transpose(1, 2)).is_contiguous()


@pytest.mark.usefixtures("small_tiles", "backward_kernels")
def test_bits_do_not_depend_on_whether_short_loops_are_split(monkeypatch):
    """Of the fused kernel this holds for the state only: its order of additions differs.

    Of the loops over up to five whole steps all, those over more than two or none are split.
    """
    inputs = oracle.random_inputs(1, 128, 2, 1, torch.float32)
    results, splits = [], []
    for steps in (0, 2, 100):
        monkeypatch.setattr(tile_lists, "STEPS_PER_FILL", steps)
        ranges = compute_key_ranges(torch.arange(128), torch.arange(128), documents(128, 93, 50))
        tiles = tile_lists.tile_list(ranges.lo, ranges.hi, SMALL.block_q, SMALL.block_k)
        splits.append(int((tiles.unmasked_to > tiles.unmasked_from).sum()))
        results.append(attention(*inputs, ranges))
    assert splits[0] > splits[1] > splits[2] == 0
    exact = ("out", "lse", "dq", "dk", "dv")
    if not torch.are_deterministic_algorithms_enabled():
        exact = ("out", "lse")
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
        assert all(torch.equal(getattr(result, x), getattr(results[0], x)) for x in exact)


@pytest.mark.parametrize(
    ("deterministic", "dtype", "head_dim", "launched"),
    [
        (False, torch.float32, 16, ["backward_hop_keys"]),
        (True, torch.float32, 16, ["backward_hop_queries", "backward_hop_keys"]),
        (False, torch.float64, 16, ["backward_hop_queries", "backward_hop_keys"]),
        (False, torch.float32, 256, ["backward_hop_queries", "backward_hop_keys"]),
    ],
)
def test_determinism_dtype_and_head_dim_select_the_backward_kernels(
    deterministic, dtype, head_dim, launched, launches
):
    inputs = oracle.random_inputs(1, 20, 2, 1, dtype, head_dim)
    key_ranges = compute_key_ranges(torch.arange(20), torch.arange(20))
    with deterministic_algorithms() if deterministic else contextlib.nullcontext():
        attention(*inputs, key_ranges)
    assert [launch.kernel for launch in launches] == ["forward_hop", *launched]
    assert launches[-1].settings["ADDS_DQ"] == (len(launched) == 1)


def test_deterministic_runs_may_choose_it():
    assert isinstance(support("triton", "cuda", Feature.DETERMINISM), Validation)


def test_no_program_is_launched_for_tiles_in_which_nothing_is_visible(small_tiles, launches):
    """Of 80 queries and keys, in tiles of 16, the last 32 queries see 17 keys."""
    lo, hi = torch.zeros(2, 80, dtype=torch.int64)
    hi[48:] = 17
    attention(*oracle.random_inputs(2, 80, 4, 2, torch.float32), KeyRanges(lo, hi))
    assert [launch.grid for launch in launches] == [(4, 2, 2), (2, 2, 2)]


@pytest.mark.usefixtures("backward_kernels")
def test_nothing_is_launched_for_a_hop_in_which_nothing_is_visible(launches):
    nothing = torch.zeros(20, dtype=torch.int64)
    attention(*oracle.random_inputs(1, 20, 2, 1, torch.float32), KeyRanges(nothing, nothing))
    assert not launches


def attention(q, k, v, dout, key_ranges) -> oracle.Attention:
    """Compute one hop and its gradients, from an empty state."""
    inputs = HopInputs(q, k, v, key_ranges, q.shape[-1] ** -0.5)
    state = RunningSoftmax.empty(q)
    triton.forward(inputs, state)
    out = state.out_BLHD.to(q.dtype)
    gradients = GradientAccumulators(*map(zero_accumulators, (q, k, v)))
    triton.backward(inputs, dout, out, state.lse_BHL, gradients)
    return oracle.Attention(state.out_BLHD, *gradients, state.lse_BHL)


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    settings: dict[str, Any]


@pytest.fixture
def launches(monkeypatch) -> list[Launch]:
    """The launches of kernels, which run as usual."""
    recorded = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **settings):
                recorded.append(Launch(self.kernel.fn.__name__, grid, settings))
                self.kernel[grid](*arguments, **settings)

            return launch

    for name in ("forward_hop", "backward_hop_queries", "backward_hop_keys"):
        monkeypatch.setattr(triton, name, Recorder(getattr(triton, name)))
    return recorded


ROWS_OF_THE_TABLE = [(64, 64), (65, 128), (96, 128), (256, 256)]


@pytest.mark.parametrize(
    ("kernel", "head_dim", "row"),
    [
        (kernel, *case)
        for kernel in KERNELS
        for case in ROWS_OF_THE_TABLE[: 3 if kernel == "fused" else 4]
    ],
)
def test_a_head_dim_uses_the_next_row_of_the_table(kernel, head_dim, row):
    assert blocks.blocks_for(kernel, head_dim, "hopper") == blocks.TABLE["hopper"][kernel][row]


@pytest.mark.parametrize(("generation", "largest"), [("ampere", 64), ("hopper", 128)])
def test_heads_too_large_for_the_registers_have_no_fused_kernel(generation, largest):
    assert blocks.has_fused_backward(largest, generation)
    assert not blocks.has_fused_backward(largest + 1, generation)


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
