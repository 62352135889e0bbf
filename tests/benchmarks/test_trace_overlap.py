"""The tool that traces overlap on a GPU: on a CPU as it is, and with stand-ins for what a CPU lacks."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import commands

ROOT = Path(__file__).parents[2]
HEADS = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--dtype", "fp32"]
SMALL = ["--device", "cpu", "--ranks", "3", "--tokens", "48", "--mean-document", "30", *HEADS]
NOT_THERE = ["deepspeed", "tyro", "yaml", "psutil", "sentencepiece", "matplotlib"]


def test_on_a_cpu_rings_are_run_and_compared_without_streams(tmp_path):
    file = tmp_path / "found.json"
    said = commands.run("trace_overlap", *SMALL, "--json", file, check=True).stdout
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    assert [(case["kernel"], case["mask"]) for case in found] == [
        ("sdpa", "causal"),
        ("sdpa", "documents"),
    ]
    assert all(
        case["right"] and case["host_waits"] is None and case["overlap"] == [] for case in found
    )
    assert "sdpa, documents: right; host waits: not asked, there is no device" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "1"], "ranks 1 must be at least 2: a ring of one sends nothing. Set --ranks."),
        (
            ["--kv-heads", "3"],
            "heads 4 must be a multiple of kv_heads 3. Set --heads or --kv-heads.",
        ),
        (["--tokens", "0"], "tokens 0 must be at least 1. Set --tokens."),
        (
            ["--device", "cuda"],
            "torch sees no GPU. Set --device cpu to run without streams and traces.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_run_is_said(flags, message, tool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(tool.ConfigError, match=message):
        tool._check(tool._parser().parse_args([*SMALL, *flags]))


def test_it_needs_neither_deepspeed_nor_what_else_a_bare_machine_lacks():
    lacks = f"import sys; sys.modules |= dict.fromkeys({NOT_THERE})"
    found = subprocess.run(
        [sys.executable, "-c", f"{lacks}; import benchmarks.trace_overlap"],
        cwd=ROOT,
        capture_output=True,
    )
    assert found.returncode == 0, found.stderr


@pytest.fixture
def tool():
    return importlib.import_module("benchmarks.trace_overlap")


class Profile:
    """A stand-in for torch's: a kernel of 10 us on each rank's hops, a message 3 us under it and 1 us behind it."""

    def __init__(self, activities):
        self.entered = False

    def __enter__(self):
        self.entered = True
        return self

    def __exit__(self, *error):
        """The trace is written when it is exported."""

    def export_chrome_trace(self, path: str) -> None:
        assert self.entered
        events = [event for rank in range(3) for event in self._of_rank(rank)]
        Path(path).write_text(json.dumps({"traceEvents": events}))

    def _of_rank(self, rank: int) -> list[dict]:
        hops, messages, began = 2 * rank, 2 * rank + 1, 100.0 * rank
        copy = {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)"}
        return [
            {
                "cat": "kernel",
                "name": "forward_hop",
                "ts": began,
                "dur": 10.0,
                "args": {"stream": hops},
            },
            copy | {"ts": began + 7, "dur": 4.0, "args": {"stream": messages, "bytes": 4096}},
            copy | {"ts": 900.0, "dur": 1.0, "args": {"stream": hops, "bytes": 2 * rank + 1}},
            copy | {"ts": 901.0, "dur": 1.0, "args": {"stream": messages, "bytes": 2 * rank + 2}},
        ]


@pytest.fixture
def modes(tool, monkeypatch) -> list[str]:
    """Everything that a GPU would be asked for; the debug modes that were set."""
    set_so_far: list[str] = []
    monkeypatch.setattr(tool, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_so_far.append)
    monkeypatch.setattr(tool.Case, "on_gpu", True)
    return set_so_far


def test_a_gpu_s_trace_becomes_rows_and_is_kept(tool, modes, tmp_path, capsys):
    case = tool.Case.of(tool._parser().parse_args(SMALL), "sdpa", "documents")
    found = tool._told(case.examined(tmp_path / "traces"))
    assert (found["right"], found["host_waits"]) == (True, [])
    rows = [(row["direction"], row["rank"]) for row in found["overlap"]]
    assert rows == [(direction, rank) for direction in ("forward", "backward") for rank in range(3)]
    figures = {
        "messages": 1,
        "travelled_ms": 0.004,
        "kernels_ms": 0.01,
        "under_own": 0.75,
        "under_any": 0.75,
    }
    assert all({name: row[name] for name in figures} == figures for row in found["overlap"])
    kept = {path.name for path in (tmp_path / "traces").iterdir()}
    assert kept == {"sdpa-documents-forward.json", "sdpa-documents-backward.json"}
    assert modes == ["error", "default"] * 2
    assert "sdpa, documents: right; host waits: none" in capsys.readouterr().out


def test_the_line_that_makes_the_host_wait_is_told(tool, modes, monkeypatch):
    """As CUDA's debug mode does, from the moment on when it is set."""

    def sum_of(tensor: torch.Tensor) -> torch.Tensor:
        if modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")
        return tensor

    monkeypatch.setattr(
        "megatron_ring.kernels.attention.state.torch.logaddexp", lambda *_, out: sum_of(out)
    )
    case = tool.Case.of(tool._parser().parse_args(SMALL), "sdpa", "causal")
    (line,) = case.examined(None)["host_waits"]
    assert "state.py" in line
    assert "torch.logaddexp" in line
    assert modes == ["error", "default"] * 2


def test_another_fault_is_not_taken_for_waiting(tool, modes):
    def fails():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        tool._where_the_host_waits(fails)
    assert modes == ["error", "default"]
