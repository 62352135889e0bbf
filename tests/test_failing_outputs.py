"""A run whose monitors, plot or console fail still succeeds, with its checkpoint."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import Forked
from tests.programs import PROGRAM, free_port, working_folder

ONE_THREAD = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
BIN = Path(sys.executable).parent
STEPS = 4
SMALL = f"""\
model: {{num_layers: 1, hidden_size: 32, num_attention_heads: 2}}
data: {{data_path: [text/tokens], seq_length: 64, split: [0.8, 0.2]}}
training: {{train_iters: {STEPS}, lr_warmup_iters: 1, eval_interval: 2, eval_iters: 1, dtype: fp32}}
checkpoint: {{save: saved}}
logging: {{metrics_file: metrics.jsonl, log_interval: 1}}
"""
MONITORS = "--wandb-project", "tiny", "--tensorboard-dir", "boards", "--csv-dir", "tables"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return working_folder(tmp_path_factory.mktemp("store"), SMALL)


@pytest.fixture
def folder(store, tmp_path) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "text").symlink_to(store / "text")
    return tmp_path


def alone(folder: Path, *flags: str, **variables: str) -> tuple[int | None, str]:
    """Return the exit code and the output of a run of one process."""
    command = [str(PROGRAM), "--config", "small.yaml", *flags]
    process = Forked(command, folder, os.environ | variables, subprocess.STDOUT)
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def steps(folder: Path) -> list[int]:
    text = (folder / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    return [record["step"] for record in records if "loss" in record]


def test_each_failing_monitor_and_plot_is_a_warning(folder):
    for monitor in ("boards", "tables"):  # where DeepSpeed creates folders of this name
        (folder / monitor).mkdir()
        (folder / monitor / "DeepSpeedJobName").touch()
    (folder / "loss.png").mkdir()
    code, output = alone(folder, *MONITORS, WANDB_MODE="no such mode")
    assert code == 0, output
    assert "Traceback" not in output
    for failed in ("wandb", "tensorboard", "csv_monitor", "loss plot loss.png"):
        assert output.count(f"warning          {failed} failed") == 1, output
    assert steps(folder) == [1, 2, 3, 4]
    assert (folder / "saved" / "latest").read_text() == "step-00000004\n"


def test_an_unwritable_path_is_refused_before_the_run(folder):
    (folder / "metrics.jsonl").write_text("step,loss\n1,5.5\n")
    (folder / "tables").touch()
    code, output = alone(folder, "--csv-dir", "tables")
    assert code == 2, output
    assert "Traceback" not in output
    assert "Set --metrics-file" in output
    assert "Set --csv-dir" in output
    assert (folder / "metrics.jsonl").read_text() == "step,loss\n1,5.5\n"
    assert not (folder / "saved").exists()


def test_a_new_run_keeps_the_metrics_of_an_earlier_run(folder):
    earlier = '{"step": 1, "loss": 5.0}\n'
    (folder / "metrics.jsonl").write_text(earlier)
    code, output = alone(folder, "--train-iters", "2", "--save", "other")
    assert code == 0, output
    assert output.count("metrics.jsonl.1") == 1
    assert (folder / "metrics.jsonl.1").read_text() == earlier
    assert steps(folder) == [1, 2]


@pytest.mark.whole
def test_a_closed_console_pipe_does_not_end_the_run(folder):
    """As in ``deepspeed pretrain_gpt.py | head``, with two ranks."""
    launcher = [BIN / "deepspeed", "--num_gpus", "2", "--master_port", free_port()]
    command = shlex.join(map(str, [*launcher, PROGRAM, "--config", "small.yaml"]))
    flags = "--context-parallel striped"
    piped = ["bash", "-c", f"{command} {flags} 2>&1 | head -n 1; exit ${{PIPESTATUS[0]}}"]
    process = subprocess.run(piped, cwd=folder, env=ONE_THREAD, capture_output=True, timeout=300)
    assert steps(folder) == [1, 2, 3, 4], process
    assert (folder / "saved" / "latest").read_text() == "step-00000004\n"
    assert (folder / "loss.png").is_file(), "the run has finished"


@pytest.mark.exhaustive
def test_a_run_of_one_process_with_a_closed_console_exits_with_0(folder):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, PROGRAM, "--config", "small.yaml"]
    streams = {"stdout": writer, "stderr": writer}
    process = subprocess.run(command, cwd=folder, env=ONE_THREAD, **streams, timeout=300)
    os.close(writer)
    assert process.returncode == 0
    assert steps(folder) == [1, 2, 3, 4]
    assert (folder / "loss.png").is_file()
