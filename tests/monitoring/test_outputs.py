"""Outputs that cannot be written are refused at the start, and never end a run later."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ring.config import LoggingConfig
from megatron_ring.errors import ConfigError
from megatron_ring.monitoring.outputs import BestEffort, check_outputs
from megatron_ring.monitoring.ring_profile import trace
from megatron_ring.monitoring.ring_profile.report import StepTime

ROOT = Path(__file__).parents[2]
PREAMBLE = """\
import logging, os, sys
logger = logging.getLogger("library")
logger.addHandler(logging.StreamHandler(sys.stdout))
logging.getLogger("other").addHandler(logging._StderrHandler())
from megatron_ring.monitoring.outputs import tolerate_console_errors
tolerate_console_errors()
"""


def refused(save: str | Path = "", **options: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        check_outputs(LoggingConfig(**options), str(save))
    return error.value.problems


def test_writable_outputs_pass_the_check_which_writes_nothing(tmp_path):
    (tmp_path / "old.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "linked.jsonl").symlink_to(tmp_path / "not there")
    for file in ("old.jsonl", "linked.jsonl", "new/folder/metrics.jsonl", "/dev/null", "/dev/full"):
        check_outputs(LoggingConfig(metrics_file=str(tmp_path / file)))
    folders = {name: str(tmp_path / "boards") for name in ("tensorboard_dir", "csv_dir")}
    check_outputs(
        LoggingConfig(**folders, wandb_project="x", profile_ring_trace=str(tmp_path / "t.json"))
    )
    check_outputs(LoggingConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linked.jsonl", "old.jsonl"]


@pytest.mark.parametrize("name", ["metrics_file", "profile_ring_trace"])
@pytest.mark.parametrize("value", [".", "file/metrics.jsonl", "n" * 300, "nul\0"])
def test_a_file_that_cannot_be_written_is_refused(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("something")
    (problem,) = refused(**{name: value})
    assert f"Set --{name.replace('_', '-')}" in problem


@pytest.mark.parametrize("name", ["tensorboard_dir", "csv_dir"])
@pytest.mark.parametrize("value", ["file", "file/boards", "n" * 300])
def test_a_folder_that_cannot_be_written_is_refused(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("something")
    (problem,) = refused(**{name: value})
    assert f"Set --{name.replace('_', '-')}" in problem


def test_all_impossible_outputs_are_reported_together_and_left_unchanged(tmp_path):
    (tmp_path / "m.csv").write_text("step,loss\n1,5.5\n")
    csv = str(tmp_path / "m.csv")
    of_metrics, of_csv = refused(metrics_file=csv, csv_dir=csv)
    assert "Set --metrics-file" in of_metrics
    assert "Set --csv-dir" in of_csv
    assert (tmp_path / "m.csv").read_text() == "step,loss\n1,5.5\n"


def test_a_trace_replaces_an_earlier_trace_and_no_other_file(tmp_path):
    index, earlier = tmp_path / "tokens.idx", tmp_path / "trace.json"
    index.write_bytes(b"MRIDX" + bytes(100))
    (problem,) = refused(profile_ring_trace=str(index))
    assert "Set --profile-ring-trace" in problem
    assert index.read_bytes() == b"MRIDX" + bytes(100)
    step = trace.StepLog(StepTime(1, 0, 0.1, 0.0, False), np.zeros((0, 4), np.int64))
    earlier.write_text(trace.as_json([trace.RankLog(0, "node", trace.ClockOffset(0, 0), [step])]))
    (tmp_path / "empty.json").touch()
    for path in (earlier, tmp_path / "empty.json", tmp_path / "new.json"):
        check_outputs(LoggingConfig(profile_ring_trace=str(path)))
    os.mkfifo(tmp_path / "pipe")
    assert "regular file" in refused(profile_ring_trace=str(tmp_path / "pipe"))[0]


def test_the_plot_beside_the_metrics_replaces_a_picture_and_no_other_file(tmp_path):
    plot, metrics = tmp_path / "loss.png", str(tmp_path / "metrics.jsonl")
    plot.write_bytes(b"notes")
    (problem,) = refused(metrics_file=metrics)
    assert "Set --metrics-file" in problem
    assert "loss.png" in problem
    check_outputs(LoggingConfig(metrics_file="/dev/null"))
    plot.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    check_outputs(LoggingConfig(metrics_file=metrics))


@pytest.mark.parametrize(
    "name", ["metrics_file", "profile_ring_trace", "csv_dir", "tensorboard_dir"]
)
@pytest.mark.parametrize(
    "own",
    [
        "latest",
        ".latest",
        ".lease-00000001",
        ".partial-00000002",
        ".removed-step-00000001/x",
        "step-00000100",
        "kept-from-00000001/deep/x",
    ],
)
def test_an_output_under_a_name_of_the_checkpoints_is_refused(name, own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = tmp_path / "saved"
    saved.mkdir()
    (tmp_path / "link").symlink_to(saved)
    for path in (saved / own, Path("saved") / own, tmp_path / "link" / own):
        problem, *_ = refused(save=saved, **{name: str(path)})
        assert f"Set --{name.replace('_', '-')}" in problem
        assert "--save" in problem
        check_outputs(LoggingConfig(**{name: str(path)}), str(tmp_path / "another"))
    check_outputs(LoggingConfig(**{name: str(saved / "other" / own)}), str(saved))


def test_an_output_without_permission_is_refused(tmp_path, monkeypatch):
    """Root may write anywhere, so the system call is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (tmp_path / "m.jsonl").touch()
    for file in ("m.jsonl", "new.jsonl"):
        (problem,) = refused(metrics_file=str(tmp_path / file))
        assert "permission" in problem


def test_a_monitor_whose_library_is_missing_is_refused(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()  # a mere folder of that name is not the library
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for library in ("wandb", "tensorboard"):
        monkeypatch.delitem(sys.modules, library, raising=False)
    problems = refused(wandb_project="x", tensorboard_dir=str(tmp_path / "boards"))
    tensorboard, wandb = problems
    assert "tensorboard" in tensorboard
    assert "wandb" in wandb


def test_a_failing_output_is_reported_once_and_counted(capsys):
    best_effort = BestEffort()
    assert best_effort("sum", sum, [1, 2]) == 3
    for _ in range(3):
        assert best_effort("sum", sum, None) is None
    best_effort("file", Path("/proc/none/x").write_text, "")
    assert best_effort.failures == {"sum": 3, "file": 1}
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2
    assert "/proc/none/x" in out[1]


def program(
    folder: Path, body: str, unbuffered: str = "", **streams: int
) -> subprocess.CompletedProcess:
    """Run ``body`` after the preamble; fails unless it reaches its end."""
    code = PREAMBLE + body + "\nopen('done', 'w').close()\n"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    completed = subprocess.run(command, cwd=folder, env=environment, **streams, timeout=60)
    assert (folder / "done").exists()
    return completed


def pipe_without_a_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


WRITES = """\
from tqdm import tqdm
bar = tqdm(total=3, mininterval=0)
for step in range(3):
    print("step", step, flush=step == 1)
    tqdm.write("line " * 3000)
    logger.warning("a library")
    bar.update()
bar.close()
os.write(1, b"C"), os.write(2, b"C")  # as a library in C would
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_lost_pipe_does_not_end_a_program(unbuffered, tmp_path):
    broken = pipe_without_a_reader()
    completed = program(tmp_path, WRITES, unbuffered, stdout=broken, stderr=broken)
    os.close(broken)
    assert completed.returncode == 0


def test_a_lost_stdout_is_reported_once_on_stderr(tmp_path):
    broken = pipe_without_a_reader()
    completed = program(tmp_path, WRITES, stdout=broken, stderr=subprocess.PIPE)
    os.close(broken)
    assert completed.returncode == 0
    assert completed.stderr.count(b"stdout           lost: Broken pipe") == 1
    assert b"Traceback" not in completed.stderr
    assert b"3/3" in completed.stderr, "the progress bar continues"


def test_a_full_disk_under_the_console_does_not_end_a_program(tmp_path):
    with open("/dev/full", "w") as full:
        body = WRITES.replace("os.write(1", "(1")
        completed = program(tmp_path, body, stdout=full, stderr=subprocess.PIPE)
    assert completed.returncode == 0
    assert b"Traceback" not in completed.stderr


def test_a_working_console_shows_everything_in_order(tmp_path):
    completed = program(tmp_path, WRITES, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out = completed.stdout.decode().splitlines()
    assert [line for line in out if line.startswith("step")] == ["step 0", "step 1", "step 2"]
    assert [line.startswith("line") for line in out].count(True) == 3
    assert out.count("a library") == 3
    assert completed.returncode == 0


def test_closed_streams_do_not_end_a_program(tmp_path):
    (tmp_path / "program.py").write_text(PREAMBLE + WRITES.replace("os.write", ""))
    command = f"PYTHONPATH={ROOT} {sys.executable} program.py >&- 2>&-"
    assert subprocess.run(command, shell=True, cwd=tmp_path, timeout=60).returncode == 0


def test_two_outputs_cannot_share_a_file():
    plot = LoggingConfig(metrics_file="runs/loss.png")
    same = LoggingConfig(metrics_file="x", profile_ring=True, profile_ring_trace="x")
    for logging_config in (plot, same):
        (problem,) = logging_config.problems()
        assert "Set --" in problem
        assert "--metrics-file" in problem
    assert LoggingConfig(metrics_file="runs/metrics.jsonl").problems() == []
