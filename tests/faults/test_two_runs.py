"""Two runs with one --save: the second is refused; a suspended one that was replaced ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ring.checkpoint import lease, names
from megatron_ring.checkpoint.lease import Owner
from megatron_ring.parallel.process_id import ProcStat
from tests.programs import PROGRAM, free_port, start_rank, working_folder

pytestmark = pytest.mark.whole

SMALL = """\
model: {num_layers: 1, hidden_size: 32, num_attention_heads: 2}
parallel: {context_parallel: striped}
data: {data_path: [text/tokens], seq_length: 64, split: [0.8, 0.2]}
training:
  {train_iters: 100000, lr_warmup_iters: 1, lr_decay_style: constant, eval_interval: 0, dtype: fp32}
checkpoint: {save: saved, load: saved, save_interval: 2, keep_last: 2}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    return working_folder(tmp_path, SMALL)


def start(folder: Path, *flags: str) -> list:
    port = free_port()
    return [start_rank(rank, port, folder, flags) for rank in (0, 1)]


def wait_for(ranks: list) -> tuple[list[int], str]:
    output = "".join(rank.communicate(timeout=240)[0] for rank in ranks)
    return [rank.returncode for rank in ranks], output


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.01)


def latest(folder: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return (folder / "saved" / "latest").read_text().strip()
    return ""


def suspend_between_saves(ranks: list, folder: Path) -> None:
    """Return once every thread of ``ranks`` is stopped and no checkpoint is being written.

    A run that is suspended after its last check of the lease still publishes that checkpoint.
    """
    while True:
        for rank in ranks:
            rank.send_signal(signal.SIGSTOP)
        wait_until(lambda: all(is_stopped(rank.pid) for rank in ranks))
        if not is_saving(folder / "saved"):
            return
        for rank in ranks:
            rank.send_signal(signal.SIGCONT)
        time.sleep(0.01)


def is_stopped(pid: int) -> bool:
    """Return whether SIGSTOP has taken effect, which it does on each thread by itself.

    Until then the process still counts as running, and its thread may renew the lease.
    """
    threads = [ProcStat.read(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")]
    return all(thread and thread.state == "T" for thread in threads)


def is_saving(saved: Path) -> bool:
    newest = names.checkpoints(saved)[0].name
    return bool(names.hidden(saved, names.PARTIAL)) or newest != latest(saved.parent)


def test_a_second_run_is_refused_on_all_ranks_and_can_start_after_the_first(folder):
    first = start(folder)
    wait_until(lambda: latest(folder))
    codes, output = wait_for(start(folder))
    assert codes == [4, 4], output
    assert output.count("another run writes to saved") == 1
    assert f"pid {first[0].pid}" in output

    first[1].send_signal(signal.SIGTERM)
    codes, output = wait_for(first)
    assert codes == [75, 75], output
    assert "Traceback" not in output
    step = int(latest(folder).removeprefix("step-"))
    codes, output = wait_for(start(folder, "--train-iters", str(step + 1)))
    assert codes == [0, 0], output
    assert "lease" not in output, "a released lease is not mentioned"
    assert latest(folder) == f"step-{step + 1:08d}"


def test_the_lease_of_a_killed_run_is_taken_over_at_once(folder):
    first = start(folder)
    wait_until(lambda: latest(folder))
    for rank in first:
        rank.kill()
    wait_for(first)
    step = int(latest(folder).removeprefix("step-"))
    codes, output = wait_for(start(folder, "--train-iters", str(step + 1)))
    assert codes == [0, 0], output
    assert "process that has ended" in output
    assert "Waiting" not in output


def test_a_suspended_run_that_was_replaced_ends_without_writing(folder):
    ranks = start(folder)
    wait_until(lambda: latest(folder))
    suspend_between_saves(ranks, folder)
    new_lease = lease.take(folder / "saved", Owner.here(), looks=3, seconds=0.5)
    before = latest(folder)
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    codes, output = wait_for(ranks)
    assert codes == [4, 4], output
    assert output.count("no longer holds saved") == 1
    assert latest(folder) == before
    new_lease.check()
    new_lease.release()


def test_ranks_of_a_killed_deepspeed_launcher_save_and_stop(folder):
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
        wait_until(lambda: "step      1/" in (folder / "log").read_text(), seconds=200)
        process.kill()
        process.wait()
        wait_until(lambda: lease.newest(folder / "saved").record.released)
        output = (folder / "log").read_text()
        assert output.count("the launcher of this rank") <= 1, (
            "if another rank notices it first, none is printed"
        )
        step = int(latest(folder).removeprefix("step-"))
        assert (
            f"stopped          after step {step}, as its launcher has ended; --load saved "
            "continues from there" in output
        )
        assert "Traceback" not in output
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
