"""flash-attn 2 and 3 by stand-ins with their parameters and conventions: parity, rows that see nothing, the version."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, key_runs
from megatron_ring.kernels.attention import flash
from megatron_ring.kernels.attention.flash_version import FlashVersion, flash_version
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.runs import KeyRanges
from megatron_ring.kernels.attention.state import RunningSoftmax
from megatron_ring.kernels.attention.tiles import TileKind
from tests import oracle, simulated_ring
from tests.kernels.attention import flash_stand_ins
from tests.kernels.attention.test_hops import LONG, SHORT, documents, mistakes, window
from tests.kernels.attention.torch_stand_ins import torchs_operators_for_cuda
from tests.tolerances import beyond_tolerance

AMPERE = Machine("NVIDIA A100-SXM4-80GB", (8, 0), 91002, flash_2="2.8.3.post2")
HOPPER = Machine("NVIDIA H100 80GB HBM3", (9, 0), 91002, flash_3=True)
MASKS = {
    "causal": window(60, 60),
    "a window": window(60, 7),
    "documents": documents(60, 40, 2, 5, 1),
    "documents of one token": documents(60, 1),
    "windows within documents": torch.maximum(window(60, 6), documents(60, 4, 17)),
}


@pytest.fixture(params=[AMPERE, HOPPER], ids=["2", "3"])
def library(request, monkeypatch):
    """One of the versions is here, and torch's operators for what is left."""
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: request.param))
    modules = {"flash_attn": {}, "flash_attn.flash_attn_interface": vars(flash_stand_ins)}
    for name, members in (
        {"flash_attn_3": {}, "flash_attn_3._C": {}} if request.param.flash_3 else modules
    ).items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))
    with (
        torchs_operators_for_cuda(),
        torch.library._scoped_library("flash_attn_3", "FRAGMENT") as operators,
    ):
        flash_stand_ins.register_3(operators)
        yield request.param


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("first_visible", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("layout", SHORT, ids=str)
def test_hops(layout, first_visible):
    assert mistakes(layout, flash, first_visible, 4, 2, torch.float16) == {}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "first_visible", [window(1400, 1400), window(1400, 100)], ids=["causal", "a window"]
)
@pytest.mark.parametrize("layout", LONG, ids=str)
def test_tiles_of_the_size_that_gpus_get(layout, first_visible):
    assert mistakes(layout, flash, first_visible, 1, 1, torch.bfloat16) == {}


PACK = oracle.documents(2, 60, (13, 1, 46))
RINGS = {
    "causal": (Mask(), oracle.documents(2, 60, (60,))),
    "a window": (Mask(window=11), oracle.documents(2, 60, (60,))),
    "documents": (
        Mask(document_starts=tuple(oracle.document_starts(PACK).tolist()), samples=2),
        PACK,
    ),
}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("mask", RINGS)
@pytest.mark.parametrize("layout", ["ring", "striped", "zigzag"])
@pytest.mark.parametrize("groups", [1, 4])
def test_rings(layout, mask, groups):
    """Several samples, keys or queries on their way, and a gradient of lse."""
    inputs, (given, document_BS) = (
        oracle.random_inputs(2, 60, 4, groups, torch.float16),
        RINGS[mask],
    )
    dlse = oracle.random_dlse(inputs[0])
    found = simulated_ring.run(
        Layout(layout, 60, 3), flash, *inputs, mask=given, dlse_BHS=dlse
    ).results
    expected = oracle.attention(*inputs, oracle.visible(document_BS, given.window), dlse)
    assert beyond_tolerance(found, expected, torch.float16) == {}


@pytest.mark.usefixtures("library")
def test_rows_that_see_nothing_keep_what_they_had():
    """Here and in the packs: between two documents there are queries without keys."""
    q, k, v, dout = oracle.random_inputs(2, 8, 2, 1, torch.float16)
    lo, hi = torch.tensor(
        [[0, 1], [0, 2], [2, 2], [2, 2], [4, 5], [4, 6], [4, 7], [8, 8]]
    ).T.contiguous()
    runs, state = KeyRanges(lo, hi), RunningSoftmax.empty(q)
    flash.forward(q, k, v, runs, 0.25, state)
    blind = [2, 3, 7]
    assert runs.packs(flash._TILING)[0].lengths == ((2, 2), (2, 0), (0, 2), (3, 3))
    assert (state.out_BLHD[:, blind] == 0).all()
    assert (state.lse_BHL[..., blind] == -torch.inf).all()
    assert state.lse_BHL[..., [0, 1, 4, 5, 6]].isfinite().all()
    gradients = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    flash.backward(dout, q, k, v, state.out_BLHD.half(), state.lse_BHL, runs, 0.25, *gradients)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all((gradient[:, [2, 3, 7]] == 0).all() for gradient in gradients)


@pytest.mark.usefixtures("library")
def test_sequences_of_one_query_between_such_without_keys():
    q, k, v, _ = oracle.random_inputs(1, 4, 4, 2, torch.float16)
    lo, hi = torch.tensor([[0, 1], [1, 1], [2, 3], [3, 4]]).T.contiguous()
    state = RunningSoftmax.empty(q)
    flash.forward(q, k, v, KeyRanges(lo, hi), 0.25, state)
    seen = v.repeat_interleave(2, dim=2).float()
    seen[:, 1] = 0
    torch.testing.assert_close(state.out_BLHD, seen)


@pytest.mark.parametrize("lengths", [(700, 3, 1, 20), (1,), (64, 65)], ids=str)
def test_striped_documents_are_one_call_in_each_hop_and_need_no_mask(lengths):
    layout, first_visible = Layout("striped", 2800, 2), documents(2800, *lengths)
    for at, source in itertools.product([layout.positions(0), layout.positions(1)], repeat=2):
        runs = key_runs(at, source, first_visible[at])
        assert {tile.kind for tile in runs.tiles(flash._TILING)} <= {TileKind.CAUSAL}
        assert len(runs.packs(flash._TILING)) <= 1


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_are_asked_for_in_a_fixed_order_where_torch_is(deterministic):
    was, flash_stand_ins.DETERMINISTIC[:] = torch.are_deterministic_algorithms_enabled(), []
    torch.use_deterministic_algorithms(deterministic)
    try:
        mistakes(SHORT[0], flash, window(60, 60), 2, 1, torch.float16)
    finally:
        torch.use_deterministic_algorithms(was)
    assert all(asked is deterministic for asked in flash_stand_ins.DETERMINISTIC)


@pytest.mark.parametrize(
    ("machine", "head_dim", "deterministic", "expected"),
    [
        (
            HOPPER,
            128,
            True,
            FlashVersion(3, "flash-attn 3 is installed and made for compute capability 9.0"),
        ),
        (
            AMPERE,
            128,
            True,
            "flash-attn 2.8.3.post2: flash-attn 3 (the package flash_attn_3) is not installed",
        ),
        (
            Machine("B200", (10, 0), 0, "2.7.0", True),
            64,
            False,
            "made for compute capability 9.0, not 10.0",
        ),
        (
            Machine("H100", (9, 0), 0, "2.7.0", True),
            256,
            True,
            "repeats itself for head sizes up to 192, not 256",
        ),
        (
            HOPPER,
            256,
            True,
            "flash-attn 2 is not installed, and flash-attn 3 repeats itself for head sizes up to 192",
        ),
        (
            Machine("A100", (8, 0), 0, "2.6.3"),
            64,
            False,
            "flash-attn 2.6.3 is older than 2.7, and flash-attn 3 (th",
        ),
        (
            Machine("V100", (7, 0), 0, "2.8.3"),
            64,
            False,
            "compute capability 8.0, and this one has 7.0",
        ),
    ],
)
def test_the_version_and_why_not_the_other(machine, head_dim, deterministic, expected):
    found = flash_version(machine, head_dim, deterministic)
    assert found == expected or expected in found.reason
