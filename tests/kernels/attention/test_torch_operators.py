"""Torch's operators for CUDA, cuDNN's included: parity of stand-ins, and schemas without data."""

from types import SimpleNamespace

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, compute_key_ranges
from megatron_ring.kernels.attention import GradientAccumulators, HopInputs, sdpa
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.running_softmax import RunningSoftmax, zero_accumulators
from tests import oracle, simulated_ring
from tests.kernels.attention.test_hops import LONG, SHORT, documents, hop_errors, window
from tests.kernels.attention.torch_stand_ins import stand_ins_for_cuda_operators
from tests.tolerances import beyond_tolerance

KERNELS = {"cudnn": sdpa.WITH_CUDNN, "sdpa": sdpa.ON_CUDA}
MASKS = {
    "causal": window(60, 60),
    "a window": window(60, 7),
    "documents": documents(60, 40, 2, 5, 1),
    "windows within documents": torch.maximum(window(60, 6), documents(60, 4, 17)),
}
each_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
each_mask = pytest.mark.parametrize("first_visible", MASKS.values(), ids=MASKS)
each_layout = pytest.mark.parametrize("layout", SHORT, ids=str)


@pytest.fixture
def operators():
    with stand_ins_for_cuda_operators():
        yield


@pytest.mark.usefixtures("operators")
@each_kernel
@each_mask
@each_layout
def test_hops_match_the_oracle(layout, first_visible, kernel):
    assert hop_errors(layout, kernel, first_visible, 4, 2, torch.float16) == {}


@pytest.mark.usefixtures("operators")
@each_mask
def test_hops_in_float32_match_the_oracle(first_visible):
    assert hop_errors(SHORT[2], sdpa.ON_CUDA_EFFICIENT, first_visible, 4, 2, torch.float32) == {}


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((8, 0), torch.bfloat16, sdpa.ON_CUDA),
        ((9, 0), torch.float16, sdpa.ON_CUDA),
        ((9, 0), torch.float32, sdpa.ON_CUDA_EFFICIENT),
        ((7, 5), torch.float16, sdpa.ON_CUDA_EFFICIENT),  # a T4
    ],
)
def test_torchs_flash_operator_is_used_only_where_it_runs(capability, dtype, expected, monkeypatch):
    monkeypatch.setattr(Machine, "here", lambda: Machine("a GPU", capability))
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    assert sdpa._kernel(on_gpu) is expected


@pytest.mark.usefixtures("operators")
@each_kernel
@pytest.mark.parametrize("layout", LONG, ids=str)
def test_tiles_of_the_size_used_on_gpus_match_the_oracle(layout, kernel):
    assert hop_errors(layout, kernel, window(1400, 1400), 1, 1, torch.bfloat16) == {}


@pytest.mark.usefixtures("operators")
@each_kernel
def test_queries_that_see_nothing_have_zero_gradient(kernel):
    q, k, v, dout = oracle.random_inputs(1, 6, 2, 1, torch.float16)
    lo, hi = torch.tensor([[0, 2], [2, 2], [2, 4], [4, 4], [4, 5], [4, 5]]).T.contiguous()
    inputs = HopInputs(q, k, v, KeyRanges(lo, hi), 0.25)
    state = RunningSoftmax.empty(q)
    kernel.forward(inputs, state)
    sums = GradientAccumulators(*map(zero_accumulators, (q, k, v)))
    kernel.backward(inputs, dout, state.out_BLHD.half(), state.lse_BHL, sums)
    assert (state.lse_BHL[..., [1, 3]] == -torch.inf).all()
    assert all(gradient.isfinite().all() for gradient in sums)
    assert (sums[0][:, [1, 3]] == 0).all()


PACK = oracle.documents(2, 60, (13, 1, 46))
RINGS = {
    "causal": (Mask(), oracle.documents(2, 60, (60,))),
    "a window": (Mask(window=11), oracle.documents(2, 60, (60,))),
    "documents": (
        Mask(document_starts=tuple(oracle.document_starts(PACK).tolist()), samples=2),
        PACK,
    ),
}


@pytest.mark.usefixtures("operators")
@each_kernel
@pytest.mark.parametrize("mask_name", RINGS)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("with_dlse", [False, True])
def test_rings_match_the_oracle(kernel, mask_name, groups, with_dlse):
    """Several samples, and either keys or queries sent around the ring.

    Half of the heads is computed first, so out is a view; with a gradient of lse it is not, because
    an output is constructed from delta.
    """
    mask, document_BS = RINGS[mask_name]
    inputs = oracle.random_inputs(2, 60, 4, groups, torch.float16)
    dlse = oracle.random_dlse(inputs[0]) if with_dlse else None
    results = simulated_ring.run(
        Layout("striped", 60, 3), kernel, *inputs, mask=mask, dlse_BHS=dlse
    ).results
    expected = oracle.attention(*inputs, oracle.visible(document_BS, mask.window), dlse)
    assert beyond_tolerance(results, expected, torch.float16) == {}


@each_kernel
@each_mask
@each_layout
def test_every_call_conforms_to_torchs_schema(layout, first_visible, kernel):
    """On meta tensors torch checks names, types and shapes of the calls it would make on a GPU."""
    query_positions = layout.positions(layout.ring_size - 1)
    key_positions = layout.positions(0)
    key_ranges = compute_key_ranges(query_positions, key_positions, first_visible[query_positions])
    q, dout, k, v = (
        torch.empty(2, 60 // layout.ring_size, n, 16, dtype=torch.bfloat16, device="meta")
        for n in (4, 4, 2, 2)
    )
    inputs = HopInputs(q, k, v, key_ranges, 0.25)
    state = RunningSoftmax.empty(q)
    kernel.forward(inputs, state)
    sums = GradientAccumulators(*map(zero_accumulators, (q, k, v)))
    kernel.backward(inputs, dout, state.out_BLHD.bfloat16(), state.lse_BHL, sums)
