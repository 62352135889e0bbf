"""A forked program runs as under an interpreter, and ends as it would there."""

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
WAITS = "import signal; signal.pause()"


def start(folder: Path, program: str, *flags: str, stderr: int = subprocess.PIPE) -> Forked:
    (folder / "program.py").write_text(program)
    return Forked([str(folder / "program.py"), *flags], folder, {"WORD": "given"}, stderr)


def test_arguments_folder_environment_outputs_and_exit_code_are_the_programs_own(tmp_path):
    program = start(tmp_path, PROGRAM, "--a", "b")
    assert program.communicate(timeout=60) == (
        f"__main__ ['--a', 'b'] {tmp_path} given None\nthe end\n",
        "a fault\n",
    )
    assert program.returncode == program.poll() == 7


def test_both_outputs_may_be_one(tmp_path):
    program = start(tmp_path, PROGRAM, stderr=subprocess.STDOUT)
    stdout, stderr = program.communicate(timeout=60)
    assert sorted(stdout.splitlines())[1:] == ["a fault", "the end"]
    assert stderr is None


def test_a_program_that_raises_prints_its_traceback(tmp_path):
    program = start(tmp_path, "raise ValueError('this')")
    assert "program.py" in program.communicate(timeout=60)[1]
    assert program.returncode == 1


def test_a_program_gets_signals(tmp_path):
    program = start(tmp_path, WAITS)
    program.send_signal(signal.SIGKILL)
    assert program.communicate(timeout=60) == ("", "")
    assert program.returncode == -signal.SIGKILL


def test_a_program_that_does_not_end_in_time_is_killed(tmp_path):
    program = start(tmp_path, WAITS)
    with pytest.raises(subprocess.TimeoutExpired):
        program.communicate(timeout=0.5)
    assert program.communicate(timeout=60) == ("", "")
    assert program.returncode == -signal.SIGKILL
