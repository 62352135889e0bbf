"""The GPU benchmark at sizes for a CPU: what it measures, what it skips and what it imports."""

import itertools
import json
from pathlib import Path

import pytest

from benchmarks.common import DTYPES
from megatron_ring.kernels.attention import measured
from tests.benchmarks import commands

SIZES = ["--tokens", "256", "--ring-sizes", "1", "4", "--packs", "2048"]
HEADS = ["--heads", "8", "--kv-heads", "2", "--head-dim", "16"]
SMALL = ["--device", "cpu", "--rounds", "1", *SIZES, *HEADS]


def bench(folder: Path, *flags: str) -> tuple[dict, str]:
    """Run the benchmark; return its JSON and its output."""
    file = folder / "bench.json"
    stdout = commands.run("bench_gpu", *SMALL, *flags, "--json", file, check=True).stdout
    return json.loads(file.read_text()), stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict, str]:
    return bench(tmp_path_factory.mktemp("bench"), "--order-dtypes", "fp32", "bf16")


def test_every_kernel_is_compared_and_every_layout_timed(run):
    findings, stdout = run
    assert all(row["correct"] for row in findings["correctness"])
    assert {row["mask"] for row in findings["correctness"]} == {"causal", "window", "documents"}
    ranks_of_layout = {row["layout"]: row["ranks"] for row in findings["layouts"]}
    expected = {"none": 1, "ring": 4, "striped": 4, "striped by 128": 4, "zigzag": 4}
    assert ranks_of_layout == expected
    assert all(row["forward_tflops"] > 0 for row in findings["layouts"])
    assert all(row["backward_tflops"] > 0 for row in findings["layouts"])
    assert [row["documents"] for row in findings["packs"]] == ["ignored", "applied", "applied"]
    assert "striped by 128" in stdout


def test_output_ends_with_rows_of_the_table_of_measured_kernels(run):
    findings, stdout = run
    cases = list(itertools.product(["fp32", "bf16"], ["CAUSAL", "SPARSE"]))
    of_reference = [row for row in findings["orders"] if row["kernel"] == "reference"]
    assert [(row["dtype"], row["mask"]) for row in of_reference] == cases
    lines = stdout.partition("for kernels/attention/measured.py\n")[2]
    table = eval(f"[{lines}]", vars(measured))
    assert [(row.device, row.dtype, row.mask.name) for row in table] == [
        ("cpu", DTYPES[dtype], mask) for dtype, mask in cases
    ]
    for row in table:
        assert row.milliseconds.keys() == {"sdpa", "reference"}
        assert "commit" in row.source
        assert row.head_dim == 16
    assert "# python -m benchmarks.bench_gpu --device cpu" in lines


def test_skipped_measurements_and_unsupported_kernels_are_listed(tmp_path):
    findings, stdout = bench(tmp_path, "--minutes", "0")
    assert findings["layouts"] == findings["packs"] == findings["orders"] == []
    assert "skipped, out of time: 256 4 zigzag sdpa" in stdout
    assert "attention_kernel flash" in stdout


def test_imports_neither_deepspeed_nor_other_optional_packages():
    commands.import_with_little_more_than_torch("bench_gpu")
