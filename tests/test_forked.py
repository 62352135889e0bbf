"""A forked program finds what an interpreter would give it, and ends as it would."""

import signal
import subprocess
from pathlib import Path

import pytest

from tests.forked import Forked

PROGRAM = """\
import atexit, os, sys
atexit.register(print, "the end")
print(__name__, sys.argv[1:], os.getcwd(), os.environ.get("WORD"), os.environ.get("HOME"))
print("a fault", file=sys.stderr)
sys.exit(7)
"""


def start(folder: Path, program: str, *flags: str, stderr: int = subprocess.PIPE) -> Forked:
    (folder / "program.py").write_text(program)
    return Forked([str(folder / "program.py"), *flags], folder, {"WORD": "given"}, stderr)


def test_its_arguments_folder_environment_output_and_exit_code_are_its_own(tmp_path):
    program = start(tmp_path, PROGRAM, "--a", "b")
    assert program.communicate(timeout=60) == (
        f"__main__ ['--a', 'b'] {tmp_path} given None\nthe end\n",
        "a fault\n",
    )
    assert program.returncode == program.poll() == 7


def test_both_outputs_may_be_one(tmp_path):
    said, nothing = start(tmp_path, PROGRAM, stderr=subprocess.STDOUT).communicate(timeout=60)
    assert sorted(said.splitlines())[1:] == ["a fault", "the end"]
    assert nothing is None


def test_one_that_fails_says_where(tmp_path):
    failed = start(tmp_path, "raise ValueError('this')")
    assert "program.py" in failed.communicate(timeout=60)[1]
    assert failed.returncode == 1


def test_signals_reach_it(tmp_path):
    struck = start(tmp_path, "import signal; signal.pause()")
    struck.send_signal(signal.SIGKILL)
    assert struck.communicate(timeout=60) == ("", "")
    assert struck.returncode == -signal.SIGKILL


def test_one_that_does_not_end_is_killed(tmp_path):
    endless = start(tmp_path, "import signal; signal.pause()")
    with pytest.raises(subprocess.TimeoutExpired):
        endless.communicate(timeout=0.5)
    assert endless.communicate(timeout=60) == ("", "")
    assert endless.returncode == -signal.SIGKILL
