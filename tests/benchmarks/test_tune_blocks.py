"""Tuning of tile sizes: candidates, choice and output, with a stand-in for the clock."""

import itertools
import json
import math
import re

import pytest
import torch
from triton.runtime.errors import OutOfResources

from benchmarks import tune_blocks
from benchmarks.common import ResultsFile
from benchmarks.tune_blocks import (
    KERNELS,
    Fastest,
    Square,
    candidates,
    compile_candidates,
    fastest,
    line,
    tune,
)
from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.attention import triton
from megatron_ring.kernels.attention.triton.blocks import TABLE, Blocks, blocks_for
from tests.benchmarks import commands

CURRENT = Blocks(128, 64, 8, 2)
SMALL = Blocks(16, 16, 4, 1)


def does_not_fit(kernel, head_dim, blocks):
    raise OutOfResources(300_000, 232_448, "shared memory")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("current", "others"), [(Blocks(128, 128, 8, 2), 26), (Blocks(32, 16, 4, 1), 27)]
)
def test_candidates_are_the_current_tiles_and_those_that_give_every_warp_rows(
    kernel, current, others
):
    first, *rest = candidates(kernel, current)
    assert first == current
    assert len(rest) == len({*rest} - {current}) == others
    for blocks in rest:
        rows = blocks.block_k if kernel in ("fused", "keys") else blocks.block_q
        assert 16 * blocks.warps <= rows


def test_the_fastest_candidate_that_fits_is_chosen():
    def timer(kernel, head_dim, blocks):
        if blocks.stages == 3:
            does_not_fit(kernel, head_dim, blocks)
        return 1.0 if blocks == Blocks(64, 128, 4, 2) else 2.0

    expected = Fastest(Blocks(64, 128, 4, 2), 1.0, tried=27, too_big=9)
    assert fastest("queries", 128, CURRENT, timer) == expected


def test_a_candidate_that_does_not_compile_is_skipped_and_counted(capsys):
    def timer(kernel, head_dim, blocks):
        if blocks.warps == 8:
            raise RuntimeError("PassManager::run failed\nat line 7")
        return 1.0 + blocks.stages

    result = fastest("forward", 128, CURRENT, timer)
    assert (result.blocks.warps, result.blocks.stages) == (4, 1)
    assert 0 < result.failed < result.tried
    assert f"{CURRENT} failed: PassManager::run failed\n" in capsys.readouterr().out
    assert f"{result.failed} failed" in line("forward", {128: result})


def test_after_the_deadline_only_the_tables_tiles_are_timed():
    result = fastest("queries", 128, CURRENT, lambda *_: 1.0, deadline=0.0)
    assert result == Fastest(CURRENT, 1.0, tried=27, too_big=0, late=26)
    assert "26 not timed" in line("queries", {128: result})


def test_candidates_are_compiled_in_processes_until_the_deadline(monkeypatch):
    """Without --jobs processes nothing would be in Triton's cache, and the timing would compile."""
    square = Square(tokens=8192, heads=1, kv_heads=1, generation="ampere", device="cpu")
    monkeypatch.setattr(tune_blocks, "ROWS", (128,))
    monkeypatch.setattr(tune_blocks, "COLUMNS", (128,))
    monkeypatch.setattr(tune_blocks, "SMALL_SQUARE", 32)
    compiled = compile_candidates(square, [64], 1, math.inf, "fork")
    assert compiled == sum(len(list(candidates(k, blocks_for(k, 64, "ampere")))) for k in KERNELS)
    assert compile_candidates(square, [64], 1, deadline=0.0, start_method="fork") < compiled


def test_results_are_added_as_they_are_found(tmp_path, capsys, monkeypatch):
    file = tmp_path / "tune.json"
    square = Square(tokens=32, heads=1, kv_heads=1, generation="hopper", device="cpu")
    monkeypatch.setattr(Square, "milliseconds", lambda *_: 2.0)
    tune(square, [64, 128], math.inf, ResultsFile(str(file), {"device": "a GPU"}))
    findings = json.loads(file.read_text())
    assert findings["device"] == "a GPU"
    rows = [(row["kernel"], row["head_dim"]) for row in findings["blocks"]]
    assert rows == list(itertools.product(KERNELS, [64, 128]))
    table = eval(f"{{{capsys.readouterr().out}}}", {"Blocks": Blocks})
    assert table["hopper"].keys() == set(KERNELS)


def test_no_fitting_candidate_is_an_error_with_kernel_and_head_dim():
    with pytest.raises(KernelUnavailable, match="28 candidates .*'keys' .*256.*--head-dims"):
        fastest("keys", 256, Blocks(64, 32, 8, 1), does_not_fit)


def test_the_printed_line_is_a_line_of_the_table():
    printed = line("keys", {64: Fastest(Blocks(64, 128, 8, 2), 1.25, 27, 3)})
    assert eval(f"{{{printed.split('#')[0]}}}") == {"keys": {64: Blocks(64, 128, 8, 2)}}
    assert re.search(r"# 1\.25 ms, 3 of 27 too big", printed)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_candidate_replaces_the_tables_tiles_only_while_it_is_timed(kernel, monkeypatch):
    before = {name: dict(sizes) for name, sizes in TABLE["ampere"].items()}
    tables = []
    launched = []

    def record_kernel(name, *rest):
        launched.append(name)
        return blocks_for(name, *rest)

    monkeypatch.setattr(triton, "blocks_for", record_kernel)

    def record_table(run):
        run()
        tables.append(TABLE["ampere"][kernel])
        return 3.0

    monkeypatch.setattr(tune_blocks, "gpu_milliseconds", record_table)
    square = Square(tokens=32, heads=2, kv_heads=1, generation="ampere", device="cpu")
    assert square.milliseconds(kernel, 64, SMALL) == 3.0
    assert tables == [{64: SMALL}] * 5
    assert kernel in launched[-2:]
    assert TABLE["ampere"] == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_exits_with_the_code_of_an_unavailable_kernel():
    run = commands.run("tune_blocks")
    assert run.returncode == KernelUnavailable.exit_code
    assert "torch finds none" in run.stderr
    assert "Traceback" not in run.stderr
