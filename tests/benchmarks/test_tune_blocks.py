"""Which tiles are tried, which are taken, and what is printed, with a stand-in for the GPU's clock."""

from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from benchmarks import tune_blocks
from benchmarks.tune_blocks import KERNELS, Found, Square, candidates, fastest, line
from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.attention.triton.blocks import TABLE, Blocks
from tests.benchmarks import commands

ROOT = Path(__file__).parents[2]


def too_big(kernel, head, blocks):
    raise OutOfResources(300_000, 232_448, "shared memory")


NOW = Blocks(128, 64, 8, 2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("now", "others"), [(Blocks(128, 128, 8, 2), 26), (Blocks(32, 16, 4, 1), 27)]
)
def test_the_list_has_what_is_there_and_else_gives_every_warp_rows(kernel, now, others):
    first, *tried = candidates(kernel, now)
    assert first == now
    assert len(tried) == len({*tried} - {now}) == others
    assert all(
        16 * one.warps <= (one.block_k if kernel == "keys" else one.block_q) for one in tried
    )


def test_the_fastest_that_fits_is_taken():
    def timed(kernel, head, blocks):
        if blocks.stages == 3:
            too_big(kernel, head, blocks)
        return 1.0 if blocks == Blocks(64, 128, 4, 2) else 2.0

    assert fastest("queries", 128, NOW, timed) == Found(
        Blocks(64, 128, 4, 2), 1.0, tried=27, left_out=9
    )


def test_a_gpu_that_none_fits_is_named():
    with pytest.raises(
        KernelUnavailable,
        match="none of the 28 candidates of 'keys' fits this GPU at head size 256",
    ):
        fastest("keys", 256, Blocks(64, 32, 8, 1), too_big)


def test_a_line_is_the_tables():
    printed = line("keys", {64: Found(Blocks(64, 128, 8, 2), 1.25, 27, 3)})
    assert eval(f"{{{printed.split('#')[0]}}}") == {"keys": {64: Blocks(64, 128, 8, 2)}}
    assert "1.25 ms, 3 of 27 too big" in printed


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_candidate_runs_in_the_tables_place_and_leaves_it_as_it_was(kernel, monkeypatch):
    before = {name: dict(sizes) for name, sizes in TABLE["ampere"].items()}
    seen = []

    def timed(act):
        act()
        seen.append(TABLE["ampere"][kernel])
        return 3.0

    monkeypatch.setattr(tune_blocks, "_timed", timed)
    square = Square(tokens=32, heads=2, kv_heads=1, generation="ampere", device="cpu")
    assert square.milliseconds(kernel, 64, Blocks(16, 16, 4, 1)) == 3.0
    assert seen == [{64: Blocks(16, 16, 4, 1)}] * 5
    assert TABLE["ampere"] == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_refuses_where_there_is_no_gpu():
    run = commands.run("tune_blocks")
    assert run.returncode == KernelUnavailable.exit_code
    assert "torch finds none" in run.stderr
    assert "Traceback" not in run.stderr
