"""The tools that draw: pictures of layouts, of the loss and of a trace, and what they reject."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import draw_layouts
from megatron_ring.errors import DataError
from megatron_ring.monitoring.plot import draw_loss
from megatron_ring.monitoring.ring_profile.timeline import draw_timeline
from tests import forked
from tests.benchmarks import commands
from tools import plot_metrics

ROOT = Path(__file__).parents[2]


def plot_metrics_tool(*flags: str | Path) -> subprocess.CompletedProcess:
    return forked.run([ROOT / "tools" / "plot_metrics.py", *flags], ROOT)


@pytest.mark.parametrize(
    ("picture", "flags", "tokens"),
    [
        ("layouts.svg", [], 32),
        ("packed.svg", ["--documents", "7", "10", "5", "34", "8", "12", "6", "4", "10"], 96),
    ],
)
def test_the_pictures_in_docs_match_the_layouts(picture, flags, tokens, tmp_path):
    assert commands.run("draw_layouts", *flags, "--output", tmp_path / picture).returncode == 0
    drawn = boxes((tmp_path / picture).read_text())
    committed = boxes((ROOT / "docs" / picture).read_text())
    assert drawn == committed
    assert len(drawn) > 3 * tokens


def test_each_document_is_a_box_under_its_tokens(tmp_path):
    draw_layouts.main(tmp_path / "x.svg", documents=(5, 11))
    drawn = (tmp_path / "x.svg").read_text()
    layouts = ("ring", "striped", "zigzag", "placed")
    assert re.findall(r"<!-- (\w+): which ring rank owns a token -->", drawn) == list(layouts)
    assert drawn.count("fill: #d9d9d9") == len(layouts)
    assert drawn.count("fill: #efefef") == len(layouts)


def boxes(svg: str) -> list[str]:
    """Return the styles of colored boxes; fonts and sizes depend on matplotlib's version."""
    return [
        line.split("style=")[1]
        for line in svg.splitlines()
        if "style=" in line and "fill: #" in line
    ]


def test_an_impossible_layout_exits_with_2_and_one_message(tmp_path):
    done = commands.run("draw_layouts", "--output", tmp_path / "x.svg", "--tokens", "30")
    assert done.returncode == 2
    assert re.search("seq_length 30 .*ring.* 4 ring ranks", done.stderr)
    assert "Traceback" not in done.stderr


def test_only_pictures_are_overwritten(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 1, "loss": 5.0, "tokens_per_second": 100.0}) + "\n")
    before = metrics.read_bytes()
    with pytest.raises(DataError, match="--output"):
        plot_metrics.main(metrics, metrics)
    assert metrics.read_bytes() == before
    for picture in ("loss.png", "loss.svg", "loss.pdf"):
        for _ in range(2):
            plot_metrics.main(metrics, tmp_path / picture)


def test_the_loss_is_drawn_from_a_metrics_file(tmp_path):
    lines = [{"step": s, "loss": 5.0 - s, "tokens_per_second": 100.0} for s in (1, 2)]
    lines.append({"step": 2, "validation_loss": 3.0, "validation_bits_per_byte": 2.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = plot_metrics_tool(
        "--metrics-file",
        tmp_path / "metrics.jsonl",
        "--output",
        tmp_path / "loss.png",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def hops(wait_seconds: float) -> list[dict]:
    return [
        {"direction": direction, "hop": hop, "wait_seconds": wait_seconds}
        for direction in ("forward", "backward")
        for hop in (1, 2)
    ]


def test_waits_of_a_profiled_run_are_drawn_below_the_loss(tmp_path):
    lines = [{"step": s, "loss": 5.0 - s, "tokens_per_second": 100.0} for s in (1, 2)]
    heights = []
    for profile in ({}, {"ring_hops": hops(0.01)}):
        (tmp_path / "metrics.jsonl").write_text(
            "".join(json.dumps(line | profile) + "\n" for line in lines)
        )
        draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.svg")
        drawn = (tmp_path / "loss.svg").read_text()
        heights.append(float(re.search(r'height="([0-9.]+)pt"', drawn)[1]))
        assert drawn.count("<!-- backward 2 -->") == len(profile)
    assert heights[1] > heights[0]


def slice(rank: int, kind: str, start: float, **args: object) -> dict:
    return {"ph": "X", "pid": rank, "tid": 0, "cat": kind, "ts": start, "dur": 900.0, "args": args}


def test_hops_of_a_trace_are_drawn_with_one_row_per_rank(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0, "tokens_per_second": 1.0}\n')
    events = [slice(rank, "hop", 1000.0 * rank, direction="forward") for rank in (0, 3)]
    events += [
        slice(3, "wait", 3500.0, direction="forward"),
        {"ph": "M", "name": "process_name", "pid": 0, "args": {}},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    flags = ("--metrics-file", tmp_path / "metrics.jsonl", "--output", tmp_path / "loss.svg")
    done = plot_metrics_tool(*flags, "--trace", tmp_path / "trace.json")
    assert done.returncode == 0, done.stderr
    drawn = (tmp_path / "loss-hops.svg").read_text()
    assert re.findall("<!-- rank ([0-9]+) -->", drawn) == ["0", "3"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"traceEvents": []}'])
def test_a_file_without_hops_is_rejected(content, tmp_path):
    (tmp_path / "trace.json").write_text(content)
    with pytest.raises(DataError, match="--trace"):
        draw_timeline(tmp_path / "trace.json", tmp_path / "hops.png")


def test_a_metrics_file_without_steps_is_rejected(tmp_path):
    for content in ("", "not json\n"):
        (tmp_path / "metrics.jsonl").write_text(content)
        done = plot_metrics_tool(
            "--metrics-file",
            tmp_path / "metrics.jsonl",
            "--output",
            tmp_path / "loss.png",
        )
        assert done.returncode == 3
        assert "--metrics-file" in done.stderr


def test_an_unwritable_picture_is_a_data_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0, "tokens_per_second": 1.0}\n')
    (tmp_path / "folder.png").mkdir()
    for output in ("folder.png", "loss.text", "metrics.jsonl/loss.png"):
        with pytest.raises(DataError, match="--output"):
            plot_metrics.main(tmp_path / "metrics.jsonl", tmp_path / output)


SLICE = {"ph": "X", "cat": "hop", "pid": 0, "ts": 1.0, "dur": 2, "args": {"direction": "forward"}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"traceEvents": 5}',
        b'{"traceEvents": [5]}',
        b'{"traceEvents":' * 5000,
        *(
            json.dumps({"traceEvents": [SLICE | changes]}).encode()
            for changes in (
                {"cat": ["hop"]},
                {"pid": "0"},
                {"pid": 10**30},
                {"ts": None},
                {"dur": float("inf")},
                {"args": []},
                {"args": {"direction": ["forward"]}},
            )
        ),
        json.dumps({"traceEvents": [SLICE | {"pid": rank} for rank in range(2000)]}).encode(),
    ],
)
def test_a_malformed_trace_is_rejected(content, tmp_path):
    (tmp_path / "trace.json").write_bytes(content)
    with pytest.raises(DataError, match=r"trace\.json.*--trace"):
        draw_timeline(tmp_path / "trace.json", tmp_path / "hops.png")
    assert not (tmp_path / "hops.png").exists()
