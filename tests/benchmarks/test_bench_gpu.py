"""The benchmark for GPUs, with sizes for a CPU: what it measures and leaves out, and that it needs little to run."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import DTYPES
from megatron_ring.kernels.attention import measured
from tests.benchmarks import commands

ROOT = Path(__file__).parents[2]
SIZES = ["--tokens", "256", "--ring-sizes", "1", "4", "--packs", "2048"]
HEADS = ["--heads", "8", "--kv-heads", "2", "--head-dim", "16"]
SMALL = ["--device", "cpu", "--rounds", "1", *SIZES, *HEADS]
NOT_THERE = ["deepspeed", "tyro", "yaml", "psutil", "sentencepiece", "matplotlib"]


def bench(folder: Path, *flags: str) -> tuple[dict, str]:
    file = folder / "found.json"
    said = commands.run("bench_gpu", *SMALL, *flags, "--json", file, check=True).stdout
    return json.loads((folder / "found.json").read_text()), said


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict, str]:
    return bench(tmp_path_factory.mktemp("bench"), "--order-dtypes", "fp32", "bf16")


def test_every_kernel_is_compared_and_every_layout_timed(run):
    found, said = run
    assert all(row["right"] for row in found["correctness"])
    assert {row["mask"] for row in found["correctness"]} == {"causal", "window", "documents"}
    layouts = {"none": 1, "ring": 4, "striped": 4, "striped by 128": 4, "zigzag": 4}
    assert {row["layout"]: row["ranks"] for row in found["layouts"]} == layouts
    assert all(row["forward_tflops"] > 0 < row["backward_tflops"] for row in found["layouts"])
    assert [row["documents"] for row in found["packs"]] == ["ignored", "seen", "seen"]
    assert "striped by 128" in said


def test_it_ends_with_the_lines_of_the_table_that_auto_goes_by(run):
    found, said = run
    cases = list(itertools.product(["fp32", "bf16"], ["CAUSAL", "SPARSE"]))
    assert [
        (row["dtype"], row["mask"]) for row in found["orders"] if row["kernel"] == "reference"
    ] == cases
    lines = said.partition("for kernels/attention/measured.py\n")[2]
    table = eval(f"[{lines}]", vars(measured))
    assert [(one.device, one.dtype, one.mask.name) for one in table] == [
        ("cpu", DTYPES[d], mask) for d, mask in cases
    ]
    assert all(
        one.milliseconds.keys() == {"sdpa", "reference"} and "commit" in one.source for one in table
    )
    assert "benchmarks/bench_gpu.py --device cpu" in lines


def test_what_there_is_no_time_for_is_named_and_so_are_kernels_left_out(tmp_path):
    found, said = bench(tmp_path, "--minutes", "0")
    assert found["layouts"] == found["packs"] == found["orders"] == []
    assert "no time was left for 256 4 zigzag sdpa" in said
    assert "attention_kernel flash cannot do" in said


def test_it_needs_neither_deepspeed_nor_what_else_a_bare_machine_lacks():
    lacks = f"import sys; sys.modules |= dict.fromkeys({NOT_THERE})"
    found = subprocess.run(
        [sys.executable, "-c", f"{lacks}; import benchmarks.bench_gpu"],
        cwd=ROOT,
        capture_output=True,
    )
    assert found.returncode == 0, found.stderr
