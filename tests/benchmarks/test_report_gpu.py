"""The report of GPU benchmarks: table, lines of measured.py and what --write replaces."""

import ast
import json
from pathlib import Path

import pytest
import torch

from benchmarks import report_gpu
from megatron_ring.errors import DataError
from megatron_ring.kernels.attention.measured import MaskKind, Measured
from megatron_ring.kernels.attention.triton.blocks import TABLE, Blocks

GPU = "NVIDIA H100 80GB HBM3"
WHERE = {"device": GPU, "torch": "2.11.0", "commit": "abc1234"}


def layout(name: str, kernel: str, of_single: float, ranks: int = 8) -> dict:
    rates = {"forward_tflops": 400 * of_single, "backward_tflops": 300 * of_single}
    row = {"tokens": 8192, "ranks": ranks, "layout": name, "kernel": kernel}
    return row | rates | {"of_single": of_single}


def pack(name: str, kernel: str, over_ring: float, documents: str = "applied") -> dict:
    row = {"tokens": 65536, "layout": name, "kernel": kernel, "documents": documents}
    return row | {"over_ring": over_ring}


BENCH = WHERE | {
    "command": "python -m benchmarks.bench_gpu --minutes 2",
    "options": {"head_dim": 128},
    "correctness": [{"correct": True}, {"correct": True}, {"correct": False}],
    "orders": [
        {"dtype": "bf16", "mask": "CAUSAL", "kernel": "cudnn", "ms": 36.2421},
        {"dtype": "bf16", "mask": "CAUSAL", "kernel": "triton", "ms": 60.2646},
        {"dtype": "bf16", "mask": "SPARSE", "kernel": "triton", "ms": 17.8702},
    ],
    "layouts": [
        layout("none", "cudnn", 1.0, ranks=1),
        layout("none", "triton", 0.57, ranks=1),
        layout("ring", "cudnn", 1.14),
        layout("striped", "cudnn", 0.92),
        layout("striped by 128", "cudnn", 0.38),
        layout("striped by 4096", "cudnn", 1.055),
        layout("striped", "triton", 0.56),
        layout("zigzag", "triton", 0.59),
    ],
    "packs": [
        pack("ring", "cudnn", 1.0, "ignored"),
        pack("striped", "triton", 3.19),
        pack("striped by 128", "triton", 3.35),
    ],
}
SPLIT = {"attention": 650.0, "matrix products": 317.0, "element-wise": 440.4, "idle": 10.0}
STEP = WHERE | {
    "command": "python -m benchmarks.bench_step",
    "options": {"layers": 24, "tokens": 32768},
    "variants": [
        {"variant": "default", "tokens_per_second": 24939.2, "share_of_peak": 0.431}
        | {"peak_gib": 60.04, "step_ms": 1313.9, "split_ms": SPLIT},
        {"variant": "torch", "error": "OutOfMemoryError"},
        {"variant": "transformers", "tokens_per_second": 18844.0, "share_of_peak": 0.32},
    ],
}
TUNE = WHERE | {
    "command": "python -m benchmarks.tune_blocks",
    "options": {"tokens": 8192},
    "generation": "hopper",
    "blocks": [
        {"kernel": "forward", "head_dim": 64, "blocks": [128, 64, 8, 3]},
        {"kernel": "forward", "head_dim": 128, "blocks": [128, 128, 8, 2]},
        {"kernel": "keys", "head_dim": 128, "blocks": [64, 128, 8, 2]},
    ],
}

# As long as MEASURED_STRIPES exists in the real file only where stripes are measured.
SOURCE = '''\
"""Measured speeds."""

_OLD = "commit 58ca893"

MEASURED = (
    Measured("cpu", torch.bfloat16, MaskKind.CAUSAL, {"sdpa": 1.0}, _OLD, 64),
    Measured(
        "NVIDIA H100 80GB HBM3",
        torch.bfloat16,
        MaskKind.CAUSAL,
        {"sdpa": 2.0},
        _OLD,
    ),
    Measured("NVIDIA H100 80GB HBM3", torch.bfloat16, MaskKind.CAUSAL, {"sdpa": 3.0}, _OLD, 64),
    Measured("NVIDIA H100 80GB HBM3", torch.float16, MaskKind.CAUSAL, {"sdpa": 4.0}, _OLD),
)

# After the table.
MEASURED_STRIPES = (
    MeasuredStripes("NVIDIA H100 80GB HBM3", "cudnn", MaskKind.CAUSAL, {1: 0.5}, _OLD),
    MeasuredStripes("NVIDIA A100-SXM4-80GB", "cudnn", MaskKind.CAUSAL, {1: 0.6}, _OLD),
)
'''


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, findings in (("bench_gpu", BENCH), ("bench_step", STEP), ("tune_blocks", TUNE)):
        (tmp_path / report_gpu.FILES[name]).write_text(json.dumps(findings))
    return tmp_path


def test_the_table_has_a_row_for_each_figure_with_device_and_command(folder):
    rows = report_gpu.table(report_gpu.read(folder)).splitlines()
    assert rows[0] == "| what | figure | target | device | command (commit) |"
    assert all(row.count("|") == 6 for row in rows)
    figures = {row.split(" | ")[0][2:]: row.split(" | ")[1:] for row in rows[2:]}
    ranks = "8 emulated ranks of 8,192 tokens"
    command = "`python -m benchmarks.bench_gpu --minutes 2` (abc1234) |"
    assert figures["zigzag (triton) over the best on one GPU, " + ranks][2:] == [
        "H100 80GB HBM3",
        command,
    ]
    assert {name: cells[:2] for name, cells in figures.items()} == {
        name: [figure, target]
        for name, figure, target in (
            ("kernels, layouts and masks equal to float64 within the tolerance", "2/3", "3/3"),
            ("triton, forward, one document of 8,192, TFLOP/s", "228", "-"),
            ("cudnn, forward, one document of 8,192, TFLOP/s", "400", "-"),
            ("triton, backward, one document of 8,192, TFLOP/s", "171", "-"),
            ("cudnn, backward, one document of 8,192, TFLOP/s", "300", "-"),
            (f"striped by 4096 (cudnn) over the best on one GPU, {ranks}", "1.05", "1.05"),
            (f"zigzag (triton) over the best on one GPU, {ranks}", "0.59", "-"),
            (
                "pack of 65,536 tokens, striped by 128 (triton), over a ring that ignores "
                "documents, 8 emulated ranks",
                "3.35",
                "4",
            ),
            ("Llama of 24 layers, 32,768 tokens: tokens/s", "24,939", "-"),
            ("Llama of 24 layers, 32,768 tokens: share of peak FLOP/s", "43.1%", "51%"),
            ("Llama of 24 layers, 32,768 tokens, transformers: tokens/s", "18,844", "-"),
            ("Llama of 24 layers, 32,768 tokens: peak memory, GiB", "60.0", "-"),
            ("Llama of 24 layers, 32,768 tokens: attention, ms of 1314", "650", "-"),
            ("Llama of 24 layers, 32,768 tokens: matrix products, ms of 1314", "317", "-"),
            ("Llama of 24 layers, 32,768 tokens: element-wise, ms of 1314", "440", "100"),
            ("Llama of 24 layers, 32,768 tokens: idle, ms of 1314", "10", "-"),
        )
    }


def test_lines_are_entries_of_the_table_of_measured_kernels():
    names = {"Measured": Measured, "MaskKind": MaskKind, "torch": torch}
    causal, sparse = eval(f"[{''.join(report_gpu.measured_lines(BENCH))}]", names)
    assert causal == Measured(
        GPU,
        torch.bfloat16,
        MaskKind.CAUSAL,
        {"cudnn": 36.24, "triton": 60.26},
        "commit abc1234, torch 2.11.0",
    )
    assert (sparse.mask, sparse.milliseconds) == (MaskKind.SPARSE, {"triton": 17.87})
    (narrow, _) = report_gpu.measured_lines(BENCH | {"options": {"head_dim": 64}})
    assert eval(f"[{narrow}]", names)[0].head_dim == 64


def test_lines_of_stripes_have_the_speed_of_each_stripe_size():
    names = {"MeasuredStripes": lambda *arguments: arguments, "MaskKind": MaskKind}
    lines = "".join(report_gpu.stripe_lines(BENCH))
    found = eval(f"[{lines}]", names | {"WIDEST": "widest"})
    source = "commit abc1234, torch 2.11.0"
    assert found == [
        (GPU, "cudnn", MaskKind.CAUSAL, {1: 0.92, 128: 0.38, "widest": 1.055}, source),
        (GPU, "triton", MaskKind.CAUSAL, {1: 0.56, "widest": 0.59}, source),
        (GPU, "triton", MaskKind.SPARSE, {1: 3.19, 128: 3.35}, source),
    ]


def test_lines_replace_those_of_the_same_device_and_case():
    """Of another dtype, head dim, device or table, and comments, everything stays."""
    source = SOURCE
    for name, lines in (
        ("MEASURED", report_gpu.measured_lines(BENCH)),
        ("MEASURED_STRIPES", report_gpu.stripe_lines(BENCH)),
    ):
        source = report_gpu.replace_lines(source, name, lines)
    for results in ('{"sdpa": 1.0}', '{"sdpa": 3.0}', '{"sdpa": 4.0}', "{1: 0.6}", "# After"):
        assert results in source
    assert "{1: 0.5}" not in source
    assert '{"sdpa": 2.0}' not in source
    tuples = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)][1:]
    assert [len(table.elts) for table in tuples] == [5, 4]
    assert max(map(len, source.splitlines())) <= 100


def test_lines_replace_themselves_when_written_again():
    lines = report_gpu.measured_lines(BENCH)
    once = report_gpu.replace_lines(SOURCE, "MEASURED", lines)
    assert report_gpu.replace_lines(once, "MEASURED", lines) == once


def test_the_real_table_takes_the_lines():
    lines = report_gpu.measured_lines(BENCH)
    source = report_gpu.replace_lines(report_gpu.MEASURED.read_text(), "MEASURED", lines)
    assert all(line in source for line in lines)
    compile(source, "measured.py", "exec")


def test_a_source_without_the_table_is_an_error():
    with pytest.raises(DataError, match="MEASURED_STRIPES, and has 0"):
        report_gpu.replace_lines("MEASURED = ()\n", "MEASURED_STRIPES", [])


def test_tile_sizes_are_entries_of_their_table():
    (generation,) = eval(f"[{{{''.join(report_gpu.block_lines(TUNE))}}}]", {"Blocks": Blocks})
    assert generation.keys() <= TABLE.keys()
    assert generation["hopper"]["forward"] == {
        64: Blocks(128, 64, 8, 3),
        128: Blocks(128, 128, 8, 2),
    }


@pytest.mark.parametrize("writes", [False, True])
def test_the_command_prints_all_and_writes_on_demand(writes, folder, monkeypatch, capsys):
    readme, document, measured = (folder / x for x in ("README.md", "gpu.md", "measured.py"))
    before = f"before\n\n{report_gpu.BEGIN}\nold\n{report_gpu.END}\n\nafter\n"
    readme.write_text(before)
    document.write_text(before)
    measured.write_text(SOURCE)
    monkeypatch.setattr(report_gpu, "ROOT", folder)
    monkeypatch.setattr(report_gpu, "README", readme)
    monkeypatch.setattr(report_gpu, "GPU_DOCUMENT", document)
    monkeypatch.setattr(report_gpu, "MEASURED", measured)
    monkeypatch.setattr("sys.argv", ["report_gpu.py", str(folder), *["--write"] * writes])
    report_gpu.main()
    printed = capsys.readouterr().out
    table = report_gpu.table(report_gpu.read(folder))
    assert table in printed
    assert all(line in printed for line in report_gpu.stripe_lines(BENCH))
    assert '"keys": {128: Blocks(64, 128, 8, 2)}' in printed
    assert (measured.read_text() == SOURCE) is not writes
    if writes:
        assert document.read_text() == before.replace("old", table)
        short = readme.read_text()
        assert len(short.splitlines()) < len(document.read_text().splitlines())
        assert "share of peak FLOP/s | 43.1% | 51% |" in short
        assert " | - | " not in short


def test_files_that_are_missing_are_left_out(folder):
    for name in ("bench_step", "tune_blocks"):
        (folder / report_gpu.FILES[name]).unlink()
    found = report_gpu.read(folder)
    assert found.keys() == {"bench_gpu"}
    assert "Llama" not in report_gpu.table(found)


def test_an_interrupted_benchmark_gives_the_rows_that_it_has():
    found = {"bench_gpu": WHERE | {"command": "c", "options": {"head_dim": 128}}}
    assert len(report_gpu.table(found).splitlines()) == 2
    assert report_gpu.measured_lines(found["bench_gpu"]) == []
    assert report_gpu.stripe_lines(found["bench_gpu"]) == []


def test_a_folder_without_results_is_an_error_that_names_the_commands(tmp_path):
    with pytest.raises(DataError, match=r"bench-gpu\.json.*make bench-step"):
        report_gpu.read(tmp_path)
    (tmp_path / "bench-gpu.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        report_gpu.read(tmp_path)
    for other in ("[1, 2]", "{}", "null", '{"device": "cpu"}'):
        (tmp_path / "bench-gpu.json").write_text(other)
        with pytest.raises(DataError, match="not written by bench_gpu.*commit, device"):
            report_gpu.read(tmp_path)


def test_a_document_without_markers_is_an_error():
    with pytest.raises(DataError, match=r"begin.*end"):
        report_gpu.replace_between_markers("no markers", "table")
