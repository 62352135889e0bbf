"""A Ctrl-C while a program imports its libraries is one line and exit code 130."""

import os
import subprocess
import sys

import pytest

from tests.programs import ROOT

PROGRAMS = [
    ROOT / "pretrain_gpt.py",
    *sorted(
        path
        for path in (ROOT / "tools").glob("*.py")
        if path.name != "constraints.py"  # imports the standard library alone
    ),
]
LIBRARIES = ["deepspeed", "lm_eval", "matplotlib", "numpy", "pydantic", "torch", "tyro", "yaml"]


def run(program, folder, raises: str, rank: str = "0") -> subprocess.CompletedProcess:
    """Run ``program`` where importing any library raises an exception."""
    for library in LIBRARIES:
        (folder / f"{library}.py").write_text(f"raise {raises}")
    path = f"{folder}{os.pathsep}{ROOT}"
    environment = os.environ | {"PYTHONPATH": path, "RANK": rank, "WORLD_SIZE": "2"}
    command = [sys.executable, str(program)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_an_interrupt_during_imports_is_one_line_of_rank_0(program, tmp_path):
    first = run(program, tmp_path, "KeyboardInterrupt")
    assert (first.returncode, first.stderr) == (130, "\nInterrupted.\n")


def test_other_ranks_print_nothing_and_other_errors_keep_their_traceback(tmp_path):
    second = run(PROGRAMS[0], tmp_path, "KeyboardInterrupt", rank="1")
    assert (second.returncode, second.stderr) == (130, "")
    failed = run(PROGRAMS[0], tmp_path, "OSError('a bug')")
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr
    assert "OSError: a bug" in failed.stderr
