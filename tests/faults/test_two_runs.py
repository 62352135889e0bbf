"""Two runs on one --save, as processes: the second is refused, and a suspended one that was replaced ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ring.checkpoint import lease
from megatron_ring.checkpoint.lease import Owner
from tests.programs import PROGRAM, free_port, start_rank, working_folder

pytestmark = pytest.mark.whole

SMALL = """\
model: {num_layers: 1, hidden_size: 32, num_attention_heads: 2}
parallel: {context_parallel: striped}
data: {data_path: [text/tokens], seq_length: 64, split: [0.8, 0.2]}
training: {train_iters: 100000, lr_warmup_iters: 1, lr_decay_style: constant, eval_interval: 0, dtype: fp32}
checkpoint: {save: saved, load: saved, save_interval: 2, keep_last: 2}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    return working_folder(tmp_path, SMALL)


def start(folder: Path, *flags: str) -> list:
    port = free_port()
    return [start_rank(rank, port, folder, flags) for rank in (0, 1)]


def ended(ranks: list) -> tuple[list[int], str]:
    said = "".join(rank.communicate(timeout=240)[0] for rank in ranks)
    return [rank.returncode for rank in ranks], said


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def latest(folder: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return (folder / "saved" / "latest").read_text().strip()
    return ""


def test_a_second_run_is_refused_on_all_ranks_and_started_after_the_first_it_goes_on(folder):
    first = start(folder)
    until(lambda: latest(folder))
    codes, said = ended(start(folder))
    assert codes == [4, 4], said
    assert said.count("another run writes to saved") == 1
    assert f"pid {first[0].pid}" in said

    first[1].send_signal(signal.SIGTERM)
    codes, said = ended(first)
    assert codes == [75, 75], said
    assert "Traceback" not in said
    step = int(latest(folder).removeprefix("step-"))
    codes, said = ended(start(folder, "--train-iters", str(step + 1)))
    assert codes == [0, 0], said
    assert "lease" not in said, "a released lease is not worth a word"
    assert latest(folder) == f"step-{step + 1:08d}"


def test_killed_it_is_replaced_at_once(folder):
    first = start(folder)
    until(lambda: latest(folder))
    for rank in first:
        rank.kill()
    ended(first)
    step = int(latest(folder).removeprefix("step-"))
    codes, said = ended(start(folder, "--train-iters", str(step + 1)))
    assert codes == [0, 0], said
    assert "process that has ended" in said
    assert "Waiting" not in said


def test_a_suspended_run_that_was_replaced_ends_and_writes_nothing_more(folder):
    ranks = start(folder)
    until(lambda: latest(folder))
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    held = lease.take(folder / "saved", Owner.here(), looks=3, seconds=0.5)
    there = latest(folder)
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    codes, said = ended(ranks)
    assert codes == [4, 4], said
    assert said.count("no longer holds saved") == 1
    assert latest(folder) == there
    held.check()
    held.release()


def test_ranks_of_a_killed_deepspeed_stop_in_order_with_a_checkpoint(folder):
    launcher = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--master_port",
        free_port(),
        "--num_gpus",
        "2",
    ]
    with (folder / "log").open("w") as log:
        command = [*launcher, str(PROGRAM), "--config", "small.yaml", "--save-interval", "0"]
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        until(lambda: "step      1/" in (folder / "log").read_text(), seconds=200)
        process.kill()
        process.wait()
        until(lambda: lease.newest(folder / "saved").record.released)
        said = (folder / "log").read_text()
        assert said.count("the launcher of this rank") <= 1, (
            "where another rank sees it first the run just stops"
        )
        step = int(latest(folder).removeprefix("step-"))
        assert (
            f"stopped          after step {step}, as its launcher has ended; --load saved continues from there"
            in said
        )
        assert "Traceback" not in said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
