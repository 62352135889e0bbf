"""The overlap trace on a CPU: without streams, and with stand-ins for the GPU and its profiler."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks import commands

HEADS = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--dtype", "fp32"]
SMALL = ["--device", "cpu", "--ranks", "3", "--tokens", "48", "--mean-document", "30", *HEADS]


def test_on_a_cpu_rings_run_without_streams_and_are_compared(tmp_path):
    file = tmp_path / "trace.json"
    stdout = commands.run("trace_overlap", *SMALL, "--json", file, check=True).stdout
    cases = json.loads(file.read_text())["cases"]
    names = [(case["kernel"], case["mask"]) for case in cases]
    assert names == [("sdpa", "causal"), ("sdpa", "documents")]
    for case in cases:
        assert case["correct"]
        assert case["host_waits"] is None
        assert case["overlap"] == []
    assert "sdpa, documents: correct; host waits: not checked on a CPU" in stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "1"], "ranks 1 .*at least 2.*--ranks"),
        (["--kv-heads", "3"], "heads 4 .*multiple of kv_heads 3.*--heads or --kv-heads"),
        (["--tokens", "0"], "tokens 0 .*at least 1.*--tokens"),
        (["--device", "cuda"], "no GPU.*--device cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_options_are_rejected(flags, message, tool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(tool.ConfigError, match=message):
        tool._check(tool._parser().parse_args([*SMALL, *flags]))


@pytest.fixture
def tool():
    return importlib.import_module("benchmarks.trace_overlap")


class FakeProfile:
    """A stand-in for torch.profiler.profile.

    Each rank has a kernel of 10 us and a message that starts 3 us before the kernel ends and ends
    1 us after it.
    """

    def __init__(self, activities):
        self.entered = False

    def __enter__(self):
        self.entered = True
        return self

    def __exit__(self, *error):
        """Do nothing: the trace is written by export_chrome_trace."""

    def export_chrome_trace(self, path: str) -> None:
        assert self.entered
        events = [event for rank in range(3) for event in self._of_rank(rank)]
        Path(path).write_text(json.dumps({"traceEvents": events}))

    def _of_rank(self, rank: int) -> list[dict]:
        hops = 2 * rank
        messages = 2 * rank + 1
        start = 100.0 * rank
        copy = {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)"}
        return [
            {
                "cat": "kernel",
                "name": "forward_hop",
                "ts": start,
                "dur": 10.0,
                "args": {"stream": hops},
            },
            copy | {"ts": start + 7, "dur": 4.0, "args": {"stream": messages, "bytes": 4096}},
            copy | {"ts": 900.0, "dur": 1.0, "args": {"stream": hops, "bytes": 2 * rank + 1}},
            copy | {"ts": 901.0, "dur": 1.0, "args": {"stream": messages, "bytes": 2 * rank + 2}},
        ]


@pytest.fixture
def modes(tool, monkeypatch) -> list[str]:
    """Stand-ins for all uses of a GPU; returns the list of debug modes that are set."""
    modes: list[str] = []
    monkeypatch.setattr(tool, "profile", FakeProfile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(tool.Case, "on_gpu", True)
    return modes


def test_a_trace_becomes_rows_and_is_kept(tool, modes, tmp_path, capsys):
    case = tool.Case.build(tool._parser().parse_args(SMALL), "sdpa", "documents")
    findings = case.examine(tmp_path / "traces")
    tool._print_case(findings)
    assert (findings["correct"], findings["host_waits"]) == (True, [])
    rows = [(row["direction"], row["rank"]) for row in findings["overlap"]]
    assert rows == [(direction, rank) for direction in ("forward", "backward") for rank in range(3)]
    figures = {
        "messages": 1,
        "messages_ms": 0.004,
        "kernels_ms": 0.01,
        "under_own": 0.75,
        "under_any": 0.75,
    }
    for row in findings["overlap"]:
        assert {name: row[name] for name in figures} == figures
    kept = {path.name for path in (tmp_path / "traces").iterdir()}
    assert kept == {"sdpa-documents-forward.json", "sdpa-documents-backward.json"}
    assert modes == ["error", "default"] * 2
    assert "sdpa, documents: correct; host waits: none" in capsys.readouterr().out


def test_the_line_that_blocks_the_host_is_reported(tool, modes, monkeypatch):
    def synchronizing_logaddexp(*_, out: torch.Tensor) -> torch.Tensor:
        """Raise as CUDA does while the debug mode is "error"."""
        if modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")
        return out

    monkeypatch.setattr(
        "megatron_ring.kernels.attention.running_softmax.torch.logaddexp", synchronizing_logaddexp
    )
    case = tool.Case.build(tool._parser().parse_args(SMALL), "sdpa", "causal")
    (line,) = case.examine(None)["host_waits"]
    assert "running_softmax.py" in line
    assert "torch.logaddexp" in line
    assert modes == ["error", "default"] * 2


def test_other_errors_are_raised(tool, modes):
    def run_out_of_memory():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        tool._first_host_wait(run_out_of_memory)
    assert modes == ["error", "default"]
