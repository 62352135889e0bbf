"""flash-attn 2, 3 and 4 as stand-ins with their parameters: parity, masked rows, the version."""

import itertools
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, compute_key_ranges
from megatron_ring.kernels.attention import GradientAccumulators, HopInputs, flash
from megatron_ring.kernels.attention.flash import FlashVersion, flash_version
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.running_softmax import RunningSoftmax, zero_accumulators
from megatron_ring.kernels.attention.tiles import TileKind
from megatron_ring.kernels.selection import Unsupported
from tests import oracle, simulated_ring
from tests.kernels.attention import flash_stand_ins
from tests.kernels.attention.test_hops import LONG, SHORT, documents, hop_errors, window
from tests.kernels.attention.torch_stand_ins import stand_ins_for_cuda_operators
from tests.tolerances import beyond_tolerance

AMPERE = Machine("NVIDIA A100-SXM4-80GB", (8, 0), 91002, flash_2="2.8.3.post2")
HOPPER = Machine("NVIDIA H100 80GB HBM3", (9, 0), 91002, flash_3=True)
BLACKWELL = Machine("NVIDIA B200", (10, 0), 91002, flash_4=flash.PINNED_4)
MASKS = {
    "causal": window(60, 60),
    "a window": window(60, 7),
    "documents": documents(60, 40, 2, 5, 1),
    "documents of one token": documents(60, 1),
    "windows within documents": torch.maximum(window(60, 6), documents(60, 4, 17)),
}


@pytest.fixture(params=[AMPERE, HOPPER, BLACKWELL], ids=["2", "3", "4"])
def library(request, monkeypatch):
    """Provide a machine with one of the versions, and torch's operators for the masked tiles."""
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: request.param))
    modules = {"flash_attn": {}, "flash_attn.flash_attn_interface": vars(flash_stand_ins)}
    if request.param.flash_3:
        modules = {"flash_attn_3": {}, "flash_attn_3._C": {}}
    if request.param.flash_4:
        interface = {"flash_attn.cute.interface": vars(flash_stand_ins)}
        modules = {"flash_attn": {}, "flash_attn.cute": {}} | interface
    for name, members in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))
    with (
        stand_ins_for_cuda_operators(),
        torch.library._scoped_library("flash_attn_3", "FRAGMENT") as operators,
    ):
        flash_stand_ins.register_version_3(operators)
        yield request.param


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("first_visible", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("layout", SHORT, ids=str)
def test_hops_match_the_oracle(layout, first_visible):
    assert hop_errors(layout, flash, first_visible, 4, 2, torch.float16) == {}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "first_visible", [window(1400, 1400), window(1400, 100)], ids=["causal", "a window"]
)
@pytest.mark.parametrize("layout", LONG, ids=str)
def test_tiles_of_the_size_used_on_gpus_match_the_oracle(layout, first_visible):
    assert hop_errors(layout, flash, first_visible, 1, 1, torch.bfloat16) == {}


PACK = oracle.documents(2, 60, (13, 1, 46))
PACK_MASK = Mask(document_starts=tuple(oracle.document_starts(PACK).tolist()), samples=2)
RINGS = {
    "causal": (Mask(), oracle.documents(2, 60, (60,))),
    "a window": (Mask(window=11), oracle.documents(2, 60, (60,))),
    "documents": (PACK_MASK, PACK),
}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("mask_name", RINGS)
@pytest.mark.parametrize("layout", ["ring", "striped", "zigzag"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("with_dlse", [False, True])
def test_rings_match_the_oracle(layout, mask_name, groups, with_dlse):
    """Several samples, and either keys or queries sent around the ring.

    Half of the heads is computed first, so out is a view unless lse has a gradient.
    """
    inputs = oracle.random_inputs(2, 60, 4, groups, torch.float16)
    mask, document_BS = RINGS[mask_name]
    dlse = oracle.random_dlse(inputs[0]) if with_dlse else None
    results = simulated_ring.run(
        Layout(layout, 60, 3), flash, *inputs, mask=mask, dlse_BHS=dlse
    ).results
    expected = oracle.attention(*inputs, oracle.visible(document_BS, mask.window), dlse)
    assert beyond_tolerance(results, expected, torch.float16) == {}


@pytest.mark.usefixtures("library")
def test_queries_that_see_nothing_keep_their_state():
    """This includes queries without keys between two documents of a packed call."""
    q, k, v, dout = oracle.random_inputs(2, 8, 2, 1, torch.float16)
    lo, hi = torch.tensor(
        [[0, 1], [0, 2], [2, 2], [2, 2], [4, 5], [4, 6], [4, 7], [8, 8]]
    ).T.contiguous()
    key_ranges = KeyRanges(lo, hi)
    inputs = HopInputs(q, k, v, key_ranges, 0.25)
    state = RunningSoftmax.empty(q)
    flash.forward(inputs, state)
    masked_rows = [2, 3, 7]
    assert key_ranges.varlen_calls(flash._TILING)[0].lengths == ((2, 2), (2, 0), (0, 2), (3, 3))
    assert (state.out_BLHD[:, masked_rows] == 0).all()
    assert (state.lse_BHL[..., masked_rows] == -torch.inf).all()
    assert state.lse_BHL[..., [0, 1, 4, 5, 6]].isfinite().all()
    gradients = GradientAccumulators(*map(zero_accumulators, (q, k, v)))
    out = state.out_BLHD.half()
    flash.backward(inputs, dout, out, state.lse_BHL, gradients)
    assert all(gradient.isfinite().all() for gradient in gradients)
    # Their dq, and dk and dv of the keys at the same indices, which no query sees.
    assert all((gradient[:, [2, 3, 7]] == 0).all() for gradient in gradients)


@pytest.mark.usefixtures("library")
def test_sequences_of_one_query_may_alternate_with_sequences_without_keys():
    q, k, v, _ = oracle.random_inputs(1, 4, 4, 2, torch.float16)
    lo, hi = torch.tensor([[0, 1], [1, 1], [2, 3], [3, 4]]).T.contiguous()
    state = RunningSoftmax.empty(q)
    flash.forward(HopInputs(q, k, v, KeyRanges(lo, hi), 0.25), state)
    expected = v.repeat_interleave(2, dim=2).float()
    expected[:, 1] = 0
    torch.testing.assert_close(state.out_BLHD, expected)


@pytest.mark.parametrize("lengths", [(700, 3, 1, 20), (1,), (64, 65)], ids=str)
def test_striped_documents_are_one_unmasked_call_per_hop(lengths):
    layout = Layout("striped", 2800, 2)
    first_visible = documents(2800, *lengths)
    shards = [layout.positions(0), layout.positions(1)]
    for query_positions, key_positions in itertools.product(shards, repeat=2):
        key_ranges = compute_key_ranges(
            query_positions, key_positions, first_visible[query_positions]
        )
        assert {tile.kind for tile in key_ranges.tiles(flash._TILING)} <= {TileKind.CAUSAL}
        assert len(key_ranges.varlen_calls(flash._TILING)) <= 1


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_are_deterministic_if_torchs_are(deterministic):
    before = torch.are_deterministic_algorithms_enabled()
    flash_stand_ins.DETERMINISTIC.clear()
    torch.use_deterministic_algorithms(deterministic)
    try:
        hop_errors(SHORT[0], flash, window(60, 60), 2, 1, torch.float16)
    finally:
        torch.use_deterministic_algorithms(before)
    assert flash_stand_ins.DETERMINISTIC
    assert all(flag is deterministic for flag in flash_stand_ins.DETERMINISTIC)


@pytest.mark.parametrize("width", [9, 700, 2000])
@pytest.mark.parametrize("name", ["ring", "striped", "zigzag"])
def test_windows_of_consecutive_tokens_need_no_masked_tile(name, width):
    """Even where a hop's part of the window begins or ends inside the shard."""
    layout = Layout(name, 16384, 4)
    first_visible = window(16384, width)
    shards = [layout.positions(ring_rank) for ring_rank in range(layout.ring_size)]
    kinds = set()
    for queries, keys in itertools.product(shards, repeat=2):
        key_ranges = compute_key_ranges(queries, keys, first_visible[queries])
        kinds |= {tile.kind for tile in key_ranges.tiles(flash._TILING)}
        assert len(key_ranges.varlen_calls(flash._TILING)) <= 2
    assert TileKind.WINDOW in kinds
    assert TileKind.MASKED not in kinds


NOT_3 = "flash-attn 3 (the package flash_attn_3) is not installed"
NOT_4 = "flash-attn 4 (the package flash-attn-4) is not installed"
H100, B200 = ("H100", (9, 0), 0), ("B200", (10, 0), 0)
BOTH = Machine(*H100, "2.8.3", True, flash_4=flash.PINNED_4)


@pytest.mark.parametrize(
    ("machine", "head_dim", "deterministic", "number", "parts"),
    [
        (HOPPER, 128, True, 3, ["flash-attn 3 is used"]),
        (BOTH, 128, False, 3, []),
        (BOTH, 256, True, 4, ["up to 192, not 256"]),
        (Machine(*H100, "2.8.3", flash_4=flash.PINNED_4), 64, True, 4, ["4.0.0b36 is used", NOT_3]),
        (Machine(*H100, "2.8.3", flash_4="4.0.0b99"), 64, True, 2, ["4.0.0b36, not 4.0.0b99"]),
        (Machine(*H100, "2.7.0", True), 256, True, 2, ["up to 192, not 256", NOT_4]),
        (AMPERE, 128, True, 2, ["flash-attn 2.8.3.post2 is used", NOT_3, NOT_4]),
        (Machine(*B200, "2.7.0", True), 64, False, 2, ["capability 9.0, not 10.0"]),
        (BLACKWELL, 128, True, 4, [NOT_3]),
        (Machine(*B200, "2.7.0", flash_4=flash.PINNED_4), 256, False, 2, ["128 on compute"]),
        (Machine("RTX 5090", (12, 0), 0, "2.8.3", flash_4=flash.PINNED_4), 64, False, 2, ["12.0"]),
    ],
)  # fmt: skip
def test_the_version_and_why_not_those_before_it(machine, head_dim, deterministic, number, parts):
    version = flash_version(machine, head_dim, deterministic)
    assert isinstance(version, FlashVersion)
    assert version.number == number
    assert all(part in version.reason for part in parts)


def test_the_extra_installs_the_version_that_is_called():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["flash"]
    assert any(one.startswith(f"flash-attn-4[cu13]=={flash.PINNED_4};") for one in extra)


@pytest.mark.parametrize(
    ("machine", "head_dim", "parts", "remedy"),
    [
        (Machine(*H100), 64, [NOT_3, NOT_4, "flash-attn 2 is not"], "'.[flash]' (flash-attn 4)"),
        (Machine("A100", (8, 0), 0, "2.6.3"), 64, ["2.6.3 is older than 2.7"], "-U flash-attn"),
        (Machine("A100", (8, 0), 0, flash_4=flash.PINNED_4), 64, ["9.x, 10.x and 11.x, not 8.0"],
         "-U flash-attn"),
        (Machine(*H100, flash_4="4.0.0b99"), 64, ["4.0.0b36, not 4.0.0b99"], "'.[flash]'"),
        (BLACKWELL, 192, ["up to 128 on compute capability 10.0, not 192"], "-U flash-attn"),
        (Machine("V100", (7, 0), 0, "2.8.3"), 64, ["8.0, and this one has 7.0"], "sdpa, or auto"),
    ],
)  # fmt: skip
def test_what_is_missing_where_no_version_can_run(machine, head_dim, parts, remedy):
    refused = flash_version(machine, head_dim, False)
    assert isinstance(refused, Unsupported)
    assert all(part in refused.reason for part in parts)
    assert remedy in refused.instead
    assert "--attention-kernel" in refused.instead
