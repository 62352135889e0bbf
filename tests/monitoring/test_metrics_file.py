"""The metrics file over kills, full disks and restarts: whole lines only, each step once, nothing
of another run lost.
"""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

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
    """Of a file in which every line must be whole."""
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(each)["step"] for each in text.splitlines()]


def superseded(path: Path) -> Path:
    return path.with_name(f"{path.name}.superseded")


def test_a_resumed_run_continues_after_its_checkpoint_and_keeps_what_it_repeats(path, file, notes):
    path.write_text(lines(0, 1, 2, 2, 3, 4))
    file.begin(2)
    file.write({"step": 3, "loss": 5.0})
    assert steps(path) == [0, 1, 2, 2, 3]
    assert superseded(path).read_text() == lines(3, 4)
    assert len(notes) == 1


def test_lines_that_are_superseded_again_follow_the_others(path, file):
    path.write_text(lines(1, 2))
    file.begin(1)
    file.write({"step": 2, "loss": 5.0})
    file.rewind_to(1)
    assert superseded(path).read_text() == lines(2) + line(2, loss=5.0)


def test_a_kill_between_copying_and_cutting_does_not_repeat_superseded_lines(path, file):
    path.write_text(lines(1, 2, 3))
    superseded(path).write_text(lines(9, 2, 3))
    file.begin(1)
    assert steps(superseded(path)) == [9, 2, 3]
    assert steps(path) == [1]


TORN = ['{"step": 3, "loss": 5.', "{", '{"step": 3}', "\0" * 40, "\0\n\0\n"]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_tail_is_dropped(torn, path, file, notes):
    path.write_text(lines(1, 2) + torn)
    file.begin(2)
    file.write({"step": 3})
    assert steps(path) == [1, 2, 3]
    assert len(notes) == 1
    assert f"{len(torn)} bytes" in notes[0]
    assert not superseded(path).exists()


def test_a_torn_line_after_the_checkpoint_is_not_kept(path, file):
    path.write_text(lines(1, 2, 3) + '{"step": 4')
    file.begin(2)
    assert steps(path) == [1, 2]
    assert superseded(path).read_text() == lines(3)


def test_a_file_of_half_a_line_alone(path, file):
    path.write_text('{"st')
    assert problem(path) is None
    file.begin(2)
    file.write({"step": 3})
    assert steps(path) == [3]


def test_lines_longer_than_what_is_read_at_a_time(path, file):
    long = line(2, ring_hops=[1.5] * 40_000)
    path.write_text(lines(1) + long + long[:70_000])
    file.begin(2)
    assert path.read_text() == lines(1) + long
    file.rewind_to(1)
    assert steps(path) == [1]
    assert superseded(path).read_text() == long


def test_steps_that_are_missing_are_named(path, file, notes):
    path.write_text(lines(1, 2))
    file.begin(5)
    assert "3 to 5" in notes[0]
    assert steps(path) == [1, 2]


def test_a_fresh_run_moves_the_lines_of_earlier_ones_aside(path, file, notes):
    for earlier in (7, 8):
        path.write_text(lines(earlier))
        file.begin(0)
        file.write({"step": 0})
    assert [steps(path.with_name(f"metrics.jsonl.{n}")) for n in (1, 2)] == [[7], [8]]
    assert steps(path) == [0]
    first, second = notes
    assert "metrics.jsonl.1" in first
    assert "metrics.jsonl.2" in second


def test_an_aside_name_that_is_taken_is_not_overwritten(path, file):
    path.with_name("metrics.jsonl.1").write_text("somebody's")
    path.write_text(lines(7))
    file.begin(0)
    assert path.with_name("metrics.jsonl.1").read_text() == "somebody's"
    assert steps(path.with_name("metrics.jsonl.2")) == [7]


def test_nothing_is_moved_aside_where_nothing_was_written(path, file, notes):
    file.begin(0)
    path.touch()
    file.begin(0)
    assert notes == []
    assert sorted(path.parent.iterdir()) == [path]


def test_a_linked_file_is_followed_on_resume_and_its_link_moved_aside(path, tmp_path, file):
    target = tmp_path / "elsewhere.jsonl"
    target.write_text(lines(1, 2))
    path.symlink_to(target)
    file.begin(1)
    assert steps(target) == [1]
    file.begin(0)
    file.write({"step": 1})
    assert [steps(target), steps(path), path.is_symlink()] == [[1], [1], False]


@pytest.fixture
def disk_of(monkeypatch):
    """Sets how many more bytes can be written to any file; None: as many as one likes."""
    real, room = os.write, [None]

    def write(file: int, data: bytes) -> int:
        if room[0] is None:
            return real(file, data)
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(file, bytes(data)[: room[0]])
        room[0] -= written
        return written

    def set_room(size: int | None) -> None:
        room[0] = size

    monkeypatch.setattr(os, "write", write)
    return set_room


def test_on_a_full_disk_no_line_is_torn_and_later_ones_follow(path, file, disk_of):
    file.begin(0)
    file.write({"step": 1})
    for room in (0, 1, 11):
        disk_of(room)
        with pytest.raises(OSError, match="No space"):
            file.write({"step": 2})
        assert steps(path) == [1]
    disk_of(None)
    file.write({"step": 3})
    assert steps(path) == [1, 3]


def test_a_resume_on_a_full_disk_still_has_every_step_once(path, file, disk_of, notes):
    path.write_text(lines(1, 2, 3))
    disk_of(4)
    file.begin(1)
    disk_of(None)
    file.write({"step": 2})
    assert steps(path) == [1, 2]
    assert superseded(path).read_text() == "", "no half line"
    assert "dropped" in notes[0]


def test_a_limit_on_the_size_of_files_is_a_full_disk(path, file):
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


def test_what_could_not_be_prepared_is_tried_again_before_the_next_line(path, file, monkeypatch):
    path.write_text(lines(1, 2, 3))
    cut = os.ftruncate
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", _refuse)
        for act in (lambda: file.begin(1), lambda: file.write({"step": 2})):
            with pytest.raises(PermissionError):
                act()
    assert os.ftruncate is cut
    file.write({"step": 3})
    assert steps(path) == [1, 3]
    assert superseded(path).read_text() == lines(2, 3), "once"


def test_what_could_not_be_moved_is_moved_before_a_roll_back(path, file, monkeypatch):
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


def test_records_are_read_past_lines_that_are_none(path):
    none = '{"step": 2, "lo{"step": 3}', "[1]", '{"loss": 1}', '{"step": true}', "[" * 9999
    path.write_text(lines(1) + "".join(f"{each}\n" for each in none) + lines(4))
    assert [record["step"] for record in records(path)] == [1, 4]


METRICS = ["", '{"step": 1}\n', '{"step":1}\n', '{"loss": 2, "step": 1}\r\n', '{"step": 0, "va']
OTHER = ["step,loss\n1,5.5\n", "\x89PNG\n", "[1]\n", '{"loss": 1}\n', "{\n", "[" * 9999]


@pytest.mark.parametrize("content", METRICS)
def test_what_may_be_a_metrics_file(content, path):
    path.write_text(content)
    assert problem(path) is None


@pytest.mark.parametrize("content", OTHER)
def test_what_is_no_metrics_file(content, path):
    path.write_text(content)
    assert "other content" in problem(path)


def test_a_folder_is_no_metrics_file(tmp_path):
    assert "folder" in problem(tmp_path)


def test_killed_before_every_operation_nothing_is_lost_torn_or_repeated(tmp_path):
    command = [sys.executable, "-m", "tests.monitoring.killed_metrics", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) >= 50
