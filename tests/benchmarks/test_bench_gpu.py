"""The GPU benchmark at sizes for a CPU: what it measures, what it skips and what it imports."""

import itertools
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_gpu
from benchmarks.bench_gpu import Bench, DeterministicKernel
from benchmarks.common import DTYPES
from benchmarks.ring_correctness import correctness
from megatron_ring.errors import ConfigError
from megatron_ring.kernels.attention import KERNELS, measured, sdpa, torch_operators
from megatron_ring.kernels.memory_contract import UNRESTRICTED
from tests.benchmarks import commands
from tests.kernels.attention.torch_stand_ins import stand_ins_for_cuda_operators

# A stripe of 128 is narrower than the widest then, of 256.
SIZES = ["--tokens", "512", "--ring-sizes", "1", "8", "--packs", "8192"]
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
    assert {row["travelling"] for row in findings["correctness"]} == {"keys", "queries"}
    ranks_of_layout = {row["layout"]: row["ranks"] for row in findings["layouts"]}
    striped = {"striped": 8, "striped by 128": 8, "striped by 256": 8}
    expected = {"none": 1, "ring": 8, **striped, "zigzag": 8}
    assert ranks_of_layout == expected
    assert all(row["forward_tflops"] > 0 for row in findings["layouts"])
    assert all(row["backward_tflops"] > 0 for row in findings["layouts"])
    documents = [row["documents"] for row in findings["packs"] if row["kernel"] == "sdpa"]
    assert documents == ["ignored", "applied", "applied", "placed"]
    assert "striped by 128" in stdout


def test_the_triton_kernel_is_timed_with_both_backward_passes(monkeypatch):
    monkeypatch.setattr(Bench, "_why_unsupported", lambda bench, kernel, dtype: "")
    options = Namespace(dtype="bf16", device="cuda", head_dim=128)
    kernels = Bench(options, deadline=0).kernels
    assert kernels.keys() == {*KERNELS, "triton ordered"} - {"reference"}
    settings = []

    class RecordingKernel:
        def backward(self, *arguments):
            settings.append((arguments, torch.are_deterministic_algorithms_enabled()))

        forward = backward

    ordered = DeterministicKernel(RecordingKernel())
    ordered.forward(1)
    ordered.backward(2)
    assert settings == [((1,), True), ((2,), True)]
    assert not torch.are_deterministic_algorithms_enabled()


def test_output_ends_with_rows_of_the_table_of_measured_kernels(run):
    findings, stdout = run
    cases = list(itertools.product(["fp32", "bf16"], ["CAUSAL", "SPARSE"]))
    of_reference = [row for row in findings["orders"] if row["kernel"] == "reference"]
    assert [(row["dtype"], row["mask"]) for row in of_reference] == cases
    lines = stdout.partition("for kernels/attention/measured.py\n")[2]
    rows = eval(f"[{lines}]", vars(measured))
    table = [row for row in rows if isinstance(row, measured.Measured)]
    assert [(row.device, row.dtype, row.mask.name) for row in table] == [
        ("cpu", DTYPES[dtype], mask) for dtype, mask in cases
    ]
    for row in table:
        assert row.milliseconds.keys() == {"sdpa", "reference"}
        assert row.head_dim == 16
        assert "commit" in row.source
    causal, documents = rows[len(table) :]
    assert (causal.kernel, causal.mask.name) == ("sdpa", "CAUSAL")
    assert causal.speeds.keys() == {1, 128, measured.WIDEST}
    assert (documents.kernel, documents.mask.name) == ("sdpa", "SPARSE")
    assert documents.speeds.keys() == {1, 128}
    of_single = {row["layout"]: row["of_single"] for row in findings["layouts"]}
    assert causal.speeds[measured.WIDEST] == pytest.approx(of_single["zigzag"], rel=1e-3)
    assert causal.speeds[1] == pytest.approx(of_single["striped"], rel=1e-3)
    assert "# python -m benchmarks.bench_gpu --device cpu" in lines


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], r"torch finds no GPU\. Set --device cpu"),
        (["--kv-heads", "3"], "heads 32 .*multiple of kv_heads 3.*--heads or --kv-heads"),
        (["--ring-sizes", "8", "0"], "ring_sizes 0 .*at least 1.*--ring-sizes"),
        (["--rounds", "0"], "rounds 0 .*at least 1.*--rounds"),
    ],
    ids=" ".join,
)
def test_invalid_options_and_a_missing_gpu_are_rejected(flags, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        bench_gpu._check(bench_gpu._parser().parse_args(flags))


def test_skipped_measurements_and_unsupported_kernels_are_listed(tmp_path):
    findings, stdout = bench(tmp_path, "--minutes", "0", "--tokens", "256", "--ring-sizes", "8")
    assert findings["layouts"] == findings["packs"] == findings["orders"] == []
    assert "skipped, out of time: 256 8 zigzag sdpa" in stdout
    assert "attention_kernel flash" in stdout


def rows_of_packs() -> list[dict]:
    """Return the correctness rows of packs for torch's operators for CUDA, as stand-ins."""
    with stand_ins_for_cuda_operators():
        rows = list(correctness({"sdpa": sdpa.ON_CUDA}, 128, 2, 16, "cpu", torch.float16))
    return [row for row in rows if row["mask"] == "documents"]


def test_the_correctness_part_finds_an_operator_that_misreads_half_of_the_heads(monkeypatch):
    """The fault seen on an H100: the start-up self-test found it, and this benchmark did not."""
    assert all(row["correct"] for row in rows_of_packs())
    memory = torch_operators._EFFICIENT_BACKWARD.memory
    monkeypatch.setitem(memory, "out", UNRESTRICTED)
    rows = rows_of_packs()
    assert {row["travelling"] for row in rows} == {"keys", "queries"}
    assert not any(row["correct"] for row in rows)
    assert all(row["dv"] < 1e-2 < row["dq"] for row in rows)
