"""The picture tools write the pictures that they are asked for, the same ones every time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import draw_layouts

ROOT = Path(__file__).parents[2]


def tool(name: str, *flags: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "tools" / name, *flags], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("picture", "flags", "tokens"),
    [("layouts.svg", [], 32), ("packed.svg", ["--documents", "23", "5", "1", "29", "6"], 64)],
)
def test_the_pictures_in_the_docs_are_what_the_layouts_are(picture, flags, tokens, tmp_path):
    assert tool("draw_layouts.py", *flags, "--output", tmp_path / picture).returncode == 0
    drawn, kept = ((folder / picture).read_text() for folder in (tmp_path, ROOT / "docs"))
    assert boxes(drawn) == boxes(kept)
    assert len(boxes(drawn)) > 3 * tokens


def test_documents_are_sheets_under_their_tokens(tmp_path):
    draw_layouts.main(tmp_path / "x.svg", documents=(5, 11))
    drawn = (tmp_path / "x.svg").read_text()
    assert [drawn.count(f"fill: {paper}") for paper in ("#d9d9d9", "#efefef")] == [3, 3]


def boxes(svg: str) -> list[str]:
    """The lines that draw coloured boxes; fonts and sizes are matplotlib's business."""
    return [line.split("style=")[1] for line in svg.splitlines() if "style=" in line and "fill: #" in line]


def test_a_layout_that_cannot_be_drawn_is_one_message(tmp_path):
    found = tool("draw_layouts.py", "--output", tmp_path / "x.svg", "--tokens", "30")
    assert found.returncode == 2
    assert "seq_length 30 cannot be laid out ring on 4 ring ranks" in found.stderr
    assert "Traceback" not in found.stderr


def test_the_loss_is_drawn_from_a_metrics_file(tmp_path):
    lines = [{"step": s, "loss": 5.0 - s, "tokens_per_second": 100.0} for s in (1, 2)]
    lines.append({"step": 2, "validation_loss": 3.0, "validation_bits_per_byte": 2.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = tool("plot_metrics.py", "--metrics-file", tmp_path / "metrics.jsonl", "--output", tmp_path / "loss.png")
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_without_steps_is_refused(tmp_path):
    for content in ("", "not json\n"):
        (tmp_path / "metrics.jsonl").write_text(content)
        found = tool("plot_metrics.py", "--metrics-file", tmp_path / "metrics.jsonl", "--output", tmp_path / "loss.png")
        assert found.returncode == 3
        assert "Set --metrics-file" in found.stderr
