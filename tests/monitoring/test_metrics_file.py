"""Across kills, full disks and restarts the metrics file has complete lines and each step once."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ring.errors import counted
from megatron_ring.monitoring.metrics_file import MetricsFile, problem, records

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def file(path, notes) -> MetricsFile:
    return MetricsFile(path, notes.append)


def line(step: int, **figures: float) -> str:
    return json.dumps({"step": step, **figures}) + "\n"


def lines(*steps: int) -> str:
    return "".join(line(step) for step in steps)


def steps(path: Path) -> list[int]:
    """Return the steps of a file whose lines must all be complete."""
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(each)["step"] for each in text.splitlines()]


def superseded(path: Path) -> Path:
    return path.with_name(f"{path.name}.superseded")


def test_a_resumed_run_continues_after_its_checkpoint_and_keeps_superseded_lines(path, file, notes):
    path.write_text(lines(0, 1, 2, 2, 3, 4))
    file.begin(2)
    file.write({"step": 3, "loss": 5.0})
    assert steps(path) == [0, 1, 2, 2, 3]
    assert superseded(path).read_text() == lines(3, 4)
    assert len(notes) == 1


def test_lines_superseded_later_are_appended(path, file):
    path.write_text(lines(1, 2))
    file.begin(1)
    file.write({"step": 2, "loss": 5.0})
    file.rewind_to(1)
    assert superseded(path).read_text() == lines(2) + line(2, loss=5.0)


def test_a_kill_between_copy_and_truncation_does_not_repeat_superseded_lines(path, file):
    path.write_text(lines(1, 2, 3))
    superseded(path).write_text(lines(9, 2, 3))
    file.begin(1)
    assert steps(superseded(path)) == [9, 2, 3]
    assert steps(path) == [1]


INCOMPLETE = ['{"step": 3, "loss": 5.', "{", '{"step": 3}', "\0" * 40, "\0\n\0\n"]


@pytest.mark.parametrize("incomplete", INCOMPLETE)
def test_an_incomplete_end_is_dropped(incomplete, path, file, notes):
    path.write_text(lines(1, 2) + incomplete)
    file.begin(2)
    file.write({"step": 3})
    assert steps(path) == [1, 2, 3]
    assert len(notes) == 1
    assert counted(len(incomplete), "byte") in notes[0]
    assert not superseded(path).exists()


def test_an_incomplete_line_after_the_checkpoint_is_not_kept(path, file):
    path.write_text(lines(1, 2, 3) + '{"step": 4')
    file.begin(2)
    assert steps(path) == [1, 2]
    assert superseded(path).read_text() == lines(3)


def test_a_file_with_only_an_incomplete_line_is_continued(path, file):
    path.write_text('{"st')
    assert problem(path) is None
    file.begin(2)
    file.write({"step": 3})
    assert steps(path) == [3]


def test_lines_longer_than_a_block_are_handled(path, file):
    long = line(2, ring_hops=[1.5] * 40_000)
    path.write_text(lines(1) + long + long[:70_000])
    file.begin(2)
    assert path.read_text() == lines(1) + long
    file.rewind_to(1)
    assert steps(path) == [1]
    assert superseded(path).read_text() == long


def test_missing_steps_are_reported(path, file, notes):
    path.write_text(lines(1, 2))
    file.begin(5)
    assert "3 to 5" in notes[0]
    assert steps(path) == [1, 2]


def test_a_run_from_step_0_renames_the_file_of_an_earlier_run(path, file, notes):
    for earlier in (7, 8):
        path.write_text(lines(earlier))
        file.begin(0)
        file.write({"step": 0})
    assert [steps(path.with_name(f"metrics.jsonl.{n}")) for n in (1, 2)] == [[7], [8]]
    assert steps(path) == [0]
    first, second = notes
    assert "metrics.jsonl.1" in first
    assert "metrics.jsonl.2" in second


def test_an_existing_file_is_not_overwritten_by_renaming(path, file):
    path.with_name("metrics.jsonl.1").write_text("somebody's")
    path.write_text(lines(7))
    file.begin(0)
    assert path.with_name("metrics.jsonl.1").read_text() == "somebody's"
    assert steps(path.with_name("metrics.jsonl.2")) == [7]


def test_an_empty_or_missing_file_is_not_renamed(path, file, notes):
    file.begin(0)
    path.touch()
    file.begin(0)
    assert notes == []
    assert sorted(path.parent.iterdir()) == [path]


def test_a_resume_follows_a_link_and_a_run_from_step_0_renames_it(path, tmp_path, file):
    target = tmp_path / "elsewhere.jsonl"
    target.write_text(lines(1, 2))
    path.symlink_to(target)
    file.begin(1)
    assert steps(target) == [1]
    file.begin(0)
    file.write({"step": 1})
    assert [steps(target), steps(path), path.is_symlink()] == [[1], [1], False]


@pytest.fixture
def limit_disk(monkeypatch):
    """A function that sets how many more bytes can be written to any file; None: unlimited."""
    original_write = os.write
    free_bytes: list[int | None] = [None]

    def write(file: int, data: bytes) -> int:
        if free_bytes[0] is None:
            return original_write(file, data)
        if free_bytes[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = original_write(file, bytes(data)[: free_bytes[0]])
        free_bytes[0] -= written
        return written

    def set_free_bytes(size: int | None) -> None:
        free_bytes[0] = size

    monkeypatch.setattr(os, "write", write)
    return set_free_bytes


def test_on_a_full_disk_no_line_is_incomplete_and_later_ones_follow(path, file, limit_disk):
    file.begin(0)
    file.write({"step": 1})
    for free_bytes in (0, 1, 11):
        limit_disk(free_bytes)
        with pytest.raises(OSError, match="No space"):
            file.write({"step": 2})
        assert steps(path) == [1]
    limit_disk(None)
    file.write({"step": 3})
    assert steps(path) == [1, 3]


def test_a_resume_on_a_full_disk_still_has_every_step_once(path, file, limit_disk, notes):
    path.write_text(lines(1, 2, 3))
    limit_disk(4)
    file.begin(1)
    limit_disk(None)
    file.write({"step": 2})
    assert steps(path) == [1, 2]
    assert superseded(path).read_text() == "", "no incomplete line"
    assert "dropped" in notes[0]


def test_a_file_size_limit_is_handled_like_a_full_disk(path, file):
    file.begin(0)
    file.write({"step": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limit[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            file.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert steps(path) == [1]


def test_a_failed_preparation_is_retried_before_the_next_line(path, file, monkeypatch):
    path.write_text(lines(1, 2, 3))
    original = os.ftruncate
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", _refuse)
        for act in (lambda: file.begin(1), lambda: file.write({"step": 2})):
            with pytest.raises(PermissionError):
                act()
    assert os.ftruncate is original
    file.write({"step": 3})
    assert steps(path) == [1, 3]
    assert superseded(path).read_text() == lines(2, 3), "once"


def test_a_failed_renaming_is_retried_before_a_roll_back(path, file, monkeypatch):
    path.write_text(lines(1, 2, 3))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _refuse)
        for act in (lambda: file.begin(0), lambda: file.rewind_to(2)):
            with pytest.raises(PermissionError):
                act()
    file.write({"step": 3})
    assert steps(path) == [3]
    assert steps(path.with_name("metrics.jsonl.1")) == [1, 2, 3]
    assert not superseded(path).exists()


def _refuse(*_) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_a_device_and_a_pipe_are_only_written_to(tmp_path):
    for steps_done in (0, 3):
        full = MetricsFile(Path("/dev/full"), pytest.fail)
        full.begin(steps_done)
        with pytest.raises(OSError, match="No space"):
            full.write({"step": 1})
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert problem(pipe) is None
    file = MetricsFile(pipe, pytest.fail)
    file.begin(0)
    with pytest.raises(OSError, match="No such device"):  # it does not wait for a reader
        file.write({"step": 1})
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    file.write({"step": 2})
    assert os.read(reader, 100) == b'{"step": 2}\n'
    os.close(reader)


def test_invalid_lines_are_skipped_when_reading(path):
    invalid = '{"step": 2, "lo{"step": 3}', "[1]", '{"loss": 1}', '{"step": true}', "[" * 9999
    path.write_text(lines(1) + "".join(f"{each}\n" for each in invalid) + lines(4))
    assert [record["step"] for record in records(path)] == [1, 4]


VALID = ["", '{"step": 1}\n', '{"step":1}\n', '{"loss": 2, "step": 1}\r\n', '{"step": 0, "va']
INVALID = ["step,loss\n1,5.5\n", "\x89PNG\n", "[1]\n", '{"loss": 1}\n', "{\n", "[" * 9999]


@pytest.mark.parametrize("content", VALID)
def test_content_that_may_be_a_metrics_file(content, path):
    path.write_text(content)
    assert problem(path) is None


@pytest.mark.parametrize("content", INVALID)
def test_content_that_is_no_metrics_file(content, path):
    path.write_text(content)
    assert "other content" in problem(path)


def test_a_folder_is_no_metrics_file(tmp_path):
    assert "folder" in problem(tmp_path)


def test_a_kill_at_any_operation_loses_tears_and_repeats_no_line(tmp_path):
    command = [sys.executable, "-m", "tests.monitoring.killed_metrics", str(tmp_path)]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert completed.returncode == 0, completed.stderr
    assert int(completed.stdout) >= 50
