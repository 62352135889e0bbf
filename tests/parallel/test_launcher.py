"""A rank finds the launcher that started it, through wrappers too, and nothing where no launcher did."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ring.parallel.launcher import Launchers
from megatron_ring.parallel.proc_stat import ProcStat

ROOT = Path(__file__).parents[2]
RANK = """\
from megatron_ring.parallel.launcher import Launchers
found = Launchers.find()
print(len(found.processes) if found else None, found.ended() is None if found else None)
"""
# Starts what its arguments say, as a launcher does.
STARTS = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)\n"


@pytest.fixture
def programs(tmp_path) -> dict[str, list[str]]:
    """Commands that start the command after them: launchers, by their names alone, and others."""
    (tmp_path / "bin").mkdir()
    for name in ("torchrun", "deepspeed", "mine.py", "deepspeed_test.py"):
        (tmp_path / "bin" / name).write_text(STARTS)
    for module in ("deepspeed/launcher/launch.py", "torch/distributed/run.py", "pkg/runner.py"):
        path = tmp_path / "lib" / module
        path.parent.mkdir(parents=True)
        path.write_text(STARTS)
        for folder in (path.parent, path.parents[1]):
            (
                folder / "__init__.py"
            ).touch()  # without it the installed package would be found first
    python = sys.executable
    by_name = {
        name: [python, str(tmp_path / "bin" / name)] for name in os.listdir(tmp_path / "bin")
    }
    modules = ("deepspeed.launcher.launch", "torch.distributed.run", "pkg.runner")
    return by_name | {module: [python, "-u", "-m", module] for module in modules} | {
        "shell": ["sh", "-c", '"$@"; exit $?', "torchrun"],  # its $0 is a name, and no program
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
    said = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == [str(watched), "True" if watched else "None"]


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "0"}, None),
        (
            {"TORCHELASTIC_RUN_ID": "x"},
            os.getpid(),
        ),  # an elastic agent in a program of the user's own
        (
            {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2", "LOCAL_RANK": "0"},
            0,
        ),  # gone before we looked
    ],
    ids=["nothing", "srun", "elastic agent", "deepspeed"],
)
def test_what_started_it_shows_in_the_environment_where_no_launcher_is_there(variables, found):
    code = """if 1:
        from megatron_ring.parallel.launcher import Launchers
        found = Launchers.find()
        print([p.pid for p in found.processes], found.ended() is None) if found else print(None)
    """
    environment = {"PATH": os.environ["PATH"]} | variables
    command = [sys.executable, "-c", code]
    said = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert said.strip() == ("None" if found is None else f"[{found}] {found != 0}")


@pytest.mark.parametrize("how", ["killed", "zombie", "reused"])
def test_a_process_has_ended_when_it_is_a_zombie_or_its_pid_is_another_ones(how):
    process = subprocess.Popen(["sleep", "600"])
    try:
        seen = ProcStat.read(process.pid)
        assert Launchers((seen,)).ended() is None
        if how == "reused":
            seen = ProcStat(seen.pid, seen.state, seen.parent, seen.start - 1)
        else:
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | (os.WNOWAIT if how == "zombie" else 0))
        assert Launchers((ProcStat.read(os.getpid()), seen)).ended() == seen
    finally:
        process.kill()
        process.wait()


FOLLOWS = """\
import sys, time
from pathlib import Path
from megatron_ring.training.stopping import Stopping
class Alone:
    def any_rank(self, so):
        return so
with Stopping(speaks=True, speaks_for_node=True) as stopping:
    if sys.argv[2] == "begun":
        stopping.begin(Alone())
    Path(sys.argv[1], "started").touch()
    step = 0
    while not (sys.argv[2] == "begun" and stopping.agreed(step)):
        step += 1
        time.sleep(0.01)
    stopping.close(None)
Path(sys.argv[1], "code").write_text(str(stopping.exit_code))
"""


@pytest.mark.parametrize("when", ["begun", "early"])
def test_a_rank_whose_launcher_is_killed_stops_as_if_it_had_a_signal(when, programs, tmp_path):
    rank = [sys.executable, "-c", FOLLOWS, str(tmp_path), when]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(programs["torchrun"] + rank, cwd=ROOT, stdout=log, stderr=log)
    until(lambda: (tmp_path / "started").exists())
    [pid] = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()
    launcher.wait()
    until(lambda: ProcStat.read(int(pid)) is None or ProcStat.read(int(pid)).has_ended)
    said = (tmp_path / "log").read_text()
    assert "its launcher has ended" in said
    assert f"pid {launcher.pid}" in said
    assert "Traceback" not in said
    assert (tmp_path / "code").exists() == (when == "begun")
    if when == "begun":
        assert (tmp_path / "code").read_text() == "75"
        assert "after step" in said


def until(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
