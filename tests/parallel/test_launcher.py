"""A rank finds the launcher that started it, also through wrappers, and none if there is none."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ring.parallel.launcher import Launchers
from megatron_ring.parallel.process_id import ProcStat

ROOT = Path(__file__).parents[2]
RANK = """\
from megatron_ring.parallel.launcher import Launchers
found = Launchers.find()
print(len(found.processes) if found else None, found.ended() is None if found else None)
"""
# Runs the command in its arguments, as a launcher does.
STARTS = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)\n"


@pytest.fixture
def programs(tmp_path) -> dict[str, list[str]]:
    """Commands that run the command after them; some have the name of a launcher, others do not."""
    (tmp_path / "bin").mkdir()
    for name in ("torchrun", "deepspeed", "mine.py", "deepspeed_test.py"):
        (tmp_path / "bin" / name).write_text(STARTS)
    for module in ("deepspeed/launcher/launch.py", "torch/distributed/run.py", "pkg/runner.py"):
        path = tmp_path / "lib" / module
        path.parent.mkdir(parents=True)
        path.write_text(STARTS)
        # Without __init__.py the installed package would be found first.
        for folder in (path.parent, path.parents[1]):
            (folder / "__init__.py").touch()
    python = sys.executable
    by_name = {
        name: [python, str(tmp_path / "bin" / name)] for name in os.listdir(tmp_path / "bin")
    }
    modules = ("deepspeed.launcher.launch", "torch.distributed.run", "pkg.runner")
    return by_name | {module: [python, "-u", "-m", module] for module in modules} | {
        "shell": ["sh", "-c", '"$@"; exit $?', "torchrun"],  # its $0 is not a program
        "nohup": ["nohup"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("chain", "watched"),
    [
        (["torchrun"], 1),
        (["torch.distributed.run"], 1),
        (["deepspeed", "deepspeed.launcher.launch"], 2),
        (["deepspeed.launcher.launch", "shell"], 2),
        (["shell", "torchrun", "shell", "mine.py"], 3),
        (["nohup", "deepspeed"], 1),
        (["mine.py"], None),
        (["shell", "nohup"], None),
        (["pkg.runner", "deepspeed_test.py"], None),
    ],
)
def test_the_processes_up_to_the_outermost_launcher_are_watched(chain, watched, programs, tmp_path):
    command = [word for name in chain for word in programs[name]] + [sys.executable, "-c", RANK]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path / 'lib'}:{ROOT}"}
    stdout = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert stdout.split() == [str(watched), "True" if watched else "None"]


@pytest.mark.parametrize(
    ("variables", "launcher_pid"),
    [
        ({}, None),
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "0"}, None),
        # torch's elastic agent in a program of the user
        ({"TORCHELASTIC_RUN_ID": "x"}, os.getpid()),
        # a launcher that ended before the rank looked for it
        ({"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2", "LOCAL_RANK": "0"}, 0),
    ],
    ids=["none", "srun", "elastic agent", "deepspeed"],
)
def test_without_a_known_command_the_environment_shows_the_launcher(variables, launcher_pid):
    code = """if 1:
        from megatron_ring.parallel.launcher import Launchers
        found = Launchers.find()
        print([p.pid for p in found.processes], found.ended() is None) if found else print(None)
    """
    environment = {"PATH": os.environ["PATH"]} | variables
    command = [sys.executable, "-c", code]
    stdout = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    expected = "None" if launcher_pid is None else f"[{launcher_pid}] {launcher_pid != 0}"
    assert stdout.strip() == expected


@pytest.mark.parametrize("how", ["killed", "zombie", "reused pid"])
def test_a_process_has_ended_if_it_is_gone_or_a_zombie_or_its_pid_was_reused(how):
    process = subprocess.Popen(["sleep", "600"])
    try:
        launcher = ProcStat.read(process.pid)
        assert Launchers((launcher,)).ended() is None
        if how == "reused pid":
            launcher = replace(launcher, start=launcher.start - 1)
        else:
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | (os.WNOWAIT if how == "zombie" else 0))
        assert Launchers((ProcStat.read(os.getpid()), launcher)).ended() == launcher
    finally:
        process.kill()
        process.wait()


RANK_THAT_FOLLOWS = """\
import sys, time
from pathlib import Path
from megatron_ring.training.stopping import Stopping
class SingleProcessConsensus:
    def any_rank(self, condition):
        return condition
with Stopping(True, True) as stopping:
    if sys.argv[2] == "begun":
        stopping.begin(SingleProcessConsensus())
    Path(sys.argv[1], "started").touch()
    step = 0
    while not (sys.argv[2] == "begun" and stopping.requested(step)):
        step += 1
        time.sleep(0.01)
    stopping.close(None)
Path(sys.argv[1], "code").write_text(str(stopping.exit_code))
"""


@pytest.mark.parametrize("when", ["begun", "early"])
def test_a_rank_whose_launcher_is_killed_stops_as_after_a_signal(when, programs, tmp_path):
    rank = [sys.executable, "-c", RANK_THAT_FOLLOWS, str(tmp_path), when]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(programs["torchrun"] + rank, cwd=ROOT, stdout=log, stderr=log)
    until(lambda: (tmp_path / "started").exists() or launcher.poll() is not None)
    assert launcher.poll() is None, (tmp_path / "log").read_text()
    [pid] = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()
    launcher.wait()
    until(lambda: ProcStat.read(int(pid)) is None or ProcStat.read(int(pid)).has_ended)
    log_text = (tmp_path / "log").read_text()
    assert "launcher" in log_text
    assert f"pid {launcher.pid}" in log_text
    assert "Traceback" not in log_text
    assert (tmp_path / "code").exists() == (when == "begun")
    if when == "begun":
        assert (tmp_path / "code").read_text() == "75"
        assert "after step" in log_text


def until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
