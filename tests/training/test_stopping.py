"""A run that is told to stop ends in order, on all ranks, and started again it is the run that was never stopped."""

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
training: {{train_iters: {STEPS}, lr_warmup_iters: 1, eval_interval: 10, eval_iters: 1, dtype: fp32}}
logging: {{log_interval: 10}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with small.yaml and a prepared store, text/tokens."""
    return working_folder(tmp_path_factory.mktemp("work"), SMALL)


def start(
    folder: Path, *flags: str, ranks: Iterable[int] = (0, 1), port: str = ""
) -> list[subprocess.Popen]:
    """These ranks of two, without a launcher."""
    port = port or free_port()
    return [start_rank(rank, port, folder, flags) for rank in ranks]


def ended(processes: list[subprocess.Popen]) -> tuple[set[int], str]:
    """The exit codes of all, and what they said; long before they would give up waiting for one another."""
    said = "".join(process.communicate(timeout=240)[0] for process in processes)
    return {process.returncode for process in processes}, said


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def metrics(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def figures(file: Path) -> list[dict]:
    """What does not depend on the clock, line by line."""
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


def test_told_in_a_save_it_stops_once_and_has_every_step_once_when_it_was_started_again(folder):
    codes, said = ended(start(folder, "--metrics-file", "straight.jsonl"))
    assert codes == {0}, said

    flags = ["--save", "saved", "--load", "saved", "--metrics-file", "stopped.jsonl"]
    ranks = start(folder, *flags, "--save-interval", "1", "--async-save")
    until(lambda: any((folder / "saved").glob(f"{PARTIAL}*")))
    ranks[1].send_signal(signal.SIGUSR1)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    codes, said = ended(ranks)
    assert codes == {75}, said
    assert "Traceback" not in said
    stopped_after = metrics(folder / "stopped.jsonl")[-1]["step"]
    assert stopped_after < STEPS
    assert (
        said.count(f"after step {stopped_after}, on a signal; --load saved continues from there")
        == 1
    )

    codes, said = ended(start(folder, *flags))
    assert codes == {0}, said
    assert figures(folder / "stopped.jsonl") == figures(folder / "straight.jsonl")


def test_one_rank_that_hears_is_enough_and_without_save_nothing_is_kept(folder):
    ranks = start(
        folder,
        "--metrics-file",
        "lost.jsonl",
        "--pipeline-model-parallel-size",
        "2",
        "--num-layers",
        "2",
    )
    until(lambda: metrics(folder / "lost.jsonl"))
    ranks[1].send_signal(signal.SIGINT)
    codes, said = ended(ranks)
    assert codes == {75}, said
    assert said.count("nothing is saved: --save is not set") == 1
    assert "Traceback" not in said


def test_told_while_it_waits_for_others_it_leaves_at_once(folder):
    port = free_port()
    ranks = start(folder, ranks=[0], port=port)
    until(lambda: answers(port))
    ranks[0].send_signal(signal.SIGUSR1)
    codes, said = ended(ranks)
    assert codes == {75}, said
    assert said.count("stopped          before the first step, on a signal") == 1


INTERRUPTED_TWICE = """\
import os, signal, time
from megatron_ring.training import stopping
stopping._SECONDS_OF_ONE_INTERRUPT = 0.2
with stopping.Stopping(is_rank_zero=True) as stop:
    stop._begun.set()  # as within a step
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # as torchrun passes on what the terminal sent already
    time.sleep(0.5)
    print("still at work", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""


def test_a_second_ctrl_c_leaves_at_once():
    left = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_TWICE], cwd=ROOT, capture_output=True, text=True
    )
    assert left.returncode == 130, left.stderr
    assert left.stdout.splitlines()[0] == "still at work"
    assert "Traceback" not in left.stderr


LEFT_BEHIND = """\
import os, signal, time
from megatron_ring.training.stopping import Stopping
with Stopping(is_rank_zero=True):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
    raise RuntimeError("connection closed by peer")
"""


def test_told_while_others_leave_before_it_it_fails_no_more_than_they_do():
    left = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND], cwd=ROOT, capture_output=True, text=True
    )
    assert left.returncode == 75, left.stderr
    assert "Traceback" not in left.stderr


def answers(port: str) -> bool:
    """Whether rank 0 is there for the others to meet."""
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
