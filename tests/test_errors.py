"""Every kind of error has its exit code, and a closed console does not end a program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ring.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Diverged,
    KernelUnavailable,
    MegatronRingError,
    RingStalled,
    nearest_multiples,
    reporting_errors,
)

EXIT_CODES = {
    MegatronRingError: 1,
    ConfigError: 2,
    DataError: 3,
    CheckpointError: 4,
    KernelUnavailable: 5,
    Diverged: 6,
    RingStalled: 76,
}


@pytest.mark.parametrize("kind", EXIT_CODES)
def test_an_entry_point_prints_only_the_message_and_exits_with_the_code_of_the_kind(kind, capsys):
    with pytest.raises(SystemExit) as raised, reporting_errors():
        raise kind("the corpus is missing. Set --data-path.")
    assert raised.value.code == EXIT_CODES[kind]
    printed = capsys.readouterr()
    assert printed.err == f"{kind.__name__}: the corpus is missing. Set --data-path.\n"
    assert printed.out == ""


def test_other_exceptions_keep_their_traceback():
    with pytest.raises(KeyError), reporting_errors():
        raise KeyError("a bug")


def test_several_problems_are_reported_together():
    error = ConfigError(["one", "two"])
    assert error.problems == ["one", "two"]
    assert str(error) == "one\ntwo"


def test_one_problem_may_be_a_string():
    assert ConfigError("one").problems == ["one"]


@pytest.mark.parametrize(
    ("value", "multiple", "nearest"),
    [(8190, 8, "8184, 8192"), (3, 8, "8"), (0, 8, "8"), (10, 4, "8, 12")],
)
def test_the_nearest_multiples_are_positive(value, multiple, nearest):
    assert nearest_multiples(value, multiple) == nearest


def test_the_message_is_bounded_but_keeps_every_problem():
    error = ConfigError(f"problem {n}." for n in range(1000))
    assert len(error.problems) == 1000
    *_, last_problem, rest = str(error).splitlines()
    assert last_problem == "problem 99."
    assert "900 more" in rest


PROGRAM = """\
import sys
from megatron_ring.errors import DataError, reporting_errors
with reporting_errors():
    for n in range(20000):
        print("line", n)
    open("done", "w").close()
    print("progress", file=sys.stderr)
    if sys.argv[1:]:
        raise DataError("damaged")
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["fail"], 3)])
def test_a_closed_reader_of_stdout_does_not_end_a_tool(arguments, code, unbuffered, tmp_path):
    environment = os.environ | {
        "PYTHONUNBUFFERED": unbuffered,
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    reader, writer = os.pipe()
    os.close(reader)
    for stderr in (subprocess.PIPE, writer):
        completed = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=writer,
            stderr=stderr,
            text=True,
            timeout=60,
        )
        assert completed.returncode == code
        assert (tmp_path / "done").exists(), "the program reached its end"
        (tmp_path / "done").unlink()
        if stderr == subprocess.PIPE:
            assert completed.stderr == "progress\n" + "DataError: damaged\n" * bool(arguments)
    os.close(writer)


def test_a_stream_that_is_closed_from_the_start_drops_its_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with reporting_errors():
        assert not sys.stdout.isatty()
        sys.stdout.buffer.write(b"a result")
    sys.stdout.close()


def test_an_open_reader_receives_every_line(tmp_path):
    completed = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert completed.stdout.splitlines() == [f"line {n}" for n in range(20000)]
    assert (completed.returncode, completed.stderr) == (0, "progress\n")


@pytest.mark.parametrize("tool", ["inspect_data.py", "prepare_data.py"])
def test_a_closed_reader_of_a_tools_help_is_no_error(tool):
    root = Path(__file__).parents[1]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, root / "tools" / tool, "--help"]
    completed = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert (completed.returncode, completed.stderr) == (0, "")
