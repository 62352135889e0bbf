"""The program with one rank stopped: the message, and the launcher's exit code."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import forked
from tests.programs import free_port

ROOT = Path(__file__).parents[1]
SMALL = """\
model: {num_layers: 2, hidden_size: 64, num_attention_heads: 2}
parallel: {context_parallel: striped, ring_timeout: 4}
data: {split: [1.0, 0.0], data_path: [tokens], seq_length: 256}
training: {train_iters: 1000000, eval_interval: 0, dtype: fp32}
logging: {metrics_file: metrics.jsonl}
"""


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def run(tmp_path) -> subprocess.Popen:
    """Two ranks under deepspeed that would train for hours; their output is in the file ``log``."""
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} of a page" for i in range(1000)))
    prepare = [ROOT / "tools" / "prepare_data.py", "--input", "text.txt"]
    prepared = forked.run([*prepare, "--output-prefix", "tokens", "--vocab-size", "300"], tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    program = [ROOT / "pretrain_gpt.py", "--config", "small.yaml"]
    deepspeed = Path(sys.executable).parent / "deepspeed"
    launcher = [deepspeed, "--master_port", free_port(), "--num_gpus", "2"]
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(
            [*launcher, *program], cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT
        )
    yield run
    processes = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
    for process in [*processes, run]:
        process.kill()
    run.wait()


@pytest.mark.whole
def test_a_stopped_rank_is_named_and_the_job_exits_with_76(run, tmp_path):
    log = tmp_path / "log"
    metrics = tmp_path / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
    children = psutil.Process(run.pid).children(recursive=True)
    (second,) = (
        child
        for child in children
        if "--local_rank=1" in child.cmdline() and "launch" not in child.cmdline()
    )
    second.send_signal(signal.SIGSTOP)
    wait_until(lambda: "RingStalled" in log.read_text())
    # Otherwise the launcher waits half a minute before it kills a stopped process.
    second.send_signal(signal.SIGCONT)
    assert run.wait(60) == 76
    (line,) = re.findall(r"RingStalled: (rank 0 .*)", log.read_text())
    assert re.search(r"^rank 0 \(.*, pid \d+\) .* step \d+.*; rank 1 \(.*\) .*stopped", line)
    assert "Traceback" not in log.read_text()
