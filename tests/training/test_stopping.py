"""A run stopped by a signal saves on all ranks; restarted, it equals an uninterrupted run."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from megatron_ring.checkpoint.names import PARTIAL
from tests.programs import free_port, start_rank, working_folder

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(ROOT / "pretrain_gpt.py"), "--config", "small.yaml"]
STEPS = 60
SMALL = f"""\
model: {{num_layers: 1, hidden_size: 32, num_attention_heads: 2}}
parallel: {{context_parallel: striped}}
data: {{data_path: [text/tokens], seq_length: 64, split: [0.8, 0.2, 0.0]}}
training:
  {{train_iters: {STEPS}, lr_warmup_iters: 1, eval_interval: 10, eval_iters: 1, dtype: fp32}}
logging: {{log_interval: 10}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a working directory with small.yaml and a prepared store, text/tokens."""
    return working_folder(tmp_path_factory.mktemp("work"), SMALL)


def start(
    folder: Path, *flags: str, ranks: Iterable[int] = (0, 1), port: str = ""
) -> list[subprocess.Popen]:
    """Start these of two ranks, without a launcher."""
    port = port or free_port()
    return [start_rank(rank, port, folder, flags) for rank in ranks]


def wait_for(processes: list[subprocess.Popen]) -> tuple[set[int], str]:
    """Return the exit codes and the output of all, within less than a collective's timeout."""
    output = "".join(process.communicate(timeout=240)[0] for process in processes)
    return {process.returncode for process in processes}, output


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.001)


def metrics(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def figures(file: Path) -> list[dict]:
    """Return the records without what depends on time."""
    timed = {
        "tokens_per_second",
        "step_seconds",
        "data_seconds",
        "slowest_rank",
        "slowest_over_mean",
    }
    return [
        {key: value for key, value in record.items() if key not in timed}
        for record in metrics(file)
    ]


def test_a_run_stopped_during_a_save_and_restarted_has_every_step_once(folder):
    codes, output = wait_for(start(folder, "--metrics-file", "straight.jsonl"))
    assert codes == {0}, output

    flags = ["--save", "saved", "--load", "saved", "--metrics-file", "stopped.jsonl"]
    ranks = start(folder, *flags, "--save-interval", "1", "--async-save")
    wait_until(lambda: any((folder / "saved").glob(f"{PARTIAL}*")))
    ranks[1].send_signal(signal.SIGUSR1)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    codes, output = wait_for(ranks)
    assert codes == {75}, output
    assert "Traceback" not in output
    stopped_after = metrics(folder / "stopped.jsonl")[-1]["step"]
    assert stopped_after < STEPS
    assert (
        output.count(f"after step {stopped_after}, on a signal; --load saved continues from there")
        == 1
    )

    codes, output = wait_for(start(folder, *flags))
    assert codes == {0}, output
    assert figures(folder / "stopped.jsonl") == figures(folder / "straight.jsonl")


def test_a_signal_to_one_rank_stops_all_and_without_save_nothing_is_saved(folder):
    ranks = start(
        folder,
        "--metrics-file",
        "lost.jsonl",
        "--pipeline-model-parallel-size",
        "2",
        "--num-layers",
        "2",
    )
    wait_until(lambda: metrics(folder / "lost.jsonl"))
    ranks[1].send_signal(signal.SIGINT)
    codes, output = wait_for(ranks)
    assert codes == {75}, output
    assert output.count("nothing is saved: --save is not set") == 1
    assert "Traceback" not in output


def test_a_signal_before_the_other_ranks_have_joined_ends_the_process(folder):
    port = free_port()
    ranks = start(folder, ranks=[0], port=port)
    wait_until(lambda: accepts_connections(port))
    ranks[0].send_signal(signal.SIGUSR1)
    codes, output = wait_for(ranks)
    assert codes == {75}, output
    assert output.count("stopped          before the first step, on a signal") == 1


INTERRUPTED_TWICE = """\
import os, signal, time
from megatron_ring.training import stopping
stopping._SECONDS_OF_ONE_INTERRUPT = 0.2
with stopping.Stopping(is_rank_zero=True) as stop:
    stop._begun.set()  # as within a step
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # as torchrun forwards what the terminal has sent, too
    time.sleep(0.5)
    print("still running", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""


def test_a_second_ctrl_c_exits_at_once():
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_TWICE], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 130, process.stderr
    assert process.stdout.splitlines()[0] == "still running"
    assert "Traceback" not in process.stderr


FAILED_AFTER_SIGNAL = """\
import os, signal, time
from megatron_ring.training.stopping import Stopping
with Stopping(is_rank_zero=True):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
    raise RuntimeError("connection closed by peer")
"""


def test_a_rank_that_fails_because_others_exited_on_the_signal_exits_as_they_do():
    process = subprocess.run(
        [sys.executable, "-c", FAILED_AFTER_SIGNAL], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 75, process.stderr
    assert "Traceback" not in process.stderr


def accepts_connections(port: str) -> bool:
    """Whether rank 0 is ready for the other ranks to join."""
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
