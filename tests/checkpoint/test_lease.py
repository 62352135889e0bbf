"""One run at a time writes to a folder of checkpoints; a dead run never blocks the next one."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ring.checkpoint import lease, names, store
from megatron_ring.checkpoint.hugging_face.importing import _check_empty
from megatron_ring.checkpoint.lease import Lease, Owner, Record
from megatron_ring.errors import CheckpointError
from megatron_ring.parallel.process_id import ProcStat
from tests.checkpoint.small import write

ROOT = Path(__file__).parents[2]
QUICK = {"looks": 3, "seconds": 0.01}
AT_ONCE = {"looks": 1, "seconds": 1000}


def here(**changes) -> Owner:
    """Return this process as the owner of another run."""
    return replace(Owner.here(), **changes)


def on_another_host(**changes) -> Owner:
    """Return a process that this one cannot see."""
    return here(host="node7", boot_id="another", pid=123, **changes)


def left_by(owner: Owner, folder: Path, number: int = 1) -> Lease:
    """Create a lease that nothing renews."""
    folder.mkdir(exist_ok=True)
    created = Lease.create(folder, number, owner)
    assert created
    return created


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(folder: Path, owner: Owner, **options) -> str:
    """Return the error message with which ``owner`` is refused the lease on ``folder``."""
    with pytest.raises(CheckpointError) as error:
        lease.take(folder, owner, **QUICK | options)
    return str(error.value)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def owned_by(process: subprocess.Popen) -> Owner:
    return here(pid=process.pid, process_start=ProcStat.read(process.pid).start)


def test_a_second_run_is_refused_at_once_and_the_error_identifies_the_first(tmp_path):
    first = lease.take(tmp_path / "saved", here(slurm_job="4711"), **QUICK)
    message = refused(tmp_path / "saved", here(), **AT_ONCE)
    for part in (
        "saved",
        f"host {Owner.here().host}",
        f"pid {os.getpid()}",
        "SLURM job 4711",
        "--save",
    ):
        assert part in message
    assert first._record.owner.started_at in message
    first.check()
    first.release()


def test_a_released_lease_is_acquired_at_once_and_one_file_remains(tmp_path, capsys):
    for number in (1, 2, 3):
        held = lease.take(tmp_path, on_another_host(), **AT_ONCE)
        assert files(tmp_path) == [f".lease-{number:08d}"]
        held.release()
        held.release()
    assert capsys.readouterr().out == ""
    lease.check_not_held(tmp_path, **AT_ONCE)


def test_a_run_on_another_host_that_renews_keeps_its_lease_whatever_its_clock(tmp_path):
    left = left_by(on_another_host(started_at="2099-01-01 00:00:00"), tmp_path)
    os.utime(tmp_path / ".lease-00000001", (0, 0))
    reports: list[str] = []

    def renewing(text: str) -> None:
        reports.append(text)
        left.renew()

    assert "node7" in refused(tmp_path, here(), report=renewing, looks=1, seconds=0)
    assert "Waiting up to" in reports[0]
    with pytest.raises(CheckpointError, match="node7"):
        lease.check_not_held(tmp_path, report=renewing, looks=1, seconds=0)


@pytest.mark.parametrize("seconds_off", [-(10**6), 10**9])
def test_a_run_on_another_host_that_does_not_renew_is_taken_over_after_the_given_polls(
    seconds_off, tmp_path, monkeypatch
):
    left = left_by(on_another_host(), tmp_path)
    os.utime(tmp_path / ".lease-00000001", (time.time() + seconds_off,) * 2)
    waits: list[float] = []
    monkeypatch.setattr(lease.time, "sleep", waits.append)
    reports: list[str] = []
    held = lease.take(tmp_path, here(), report=reports.append, looks=12, seconds=5.0)
    assert waits == [5.0] * 12
    assert "60 s" in reports[0]
    assert "did not renew it for 60 s" in reports[-1]
    assert files(tmp_path) == [".lease-00000002"]
    with pytest.raises(CheckpointError, match=f"pid {os.getpid()}"):
        left.check()
    held.check()
    held.release()


def test_a_renewal_after_many_polls_keeps_the_lease(tmp_path, monkeypatch):
    left = left_by(on_another_host(), tmp_path)
    polls = iter(range(100))
    monkeypatch.setattr(lease.time, "sleep", lambda _: next(polls) == 10 and left.renew())
    refused(tmp_path, here(), looks=12)


def test_a_lease_released_while_another_run_waits_is_acquired(tmp_path, monkeypatch):
    left = left_by(on_another_host(), tmp_path)
    monkeypatch.setattr(lease.time, "sleep", lambda _: left.release())
    lease.take(tmp_path, here(), looks=12).release()


@pytest.mark.parametrize("end", ["gone", "zombie", "reused"])
def test_the_lease_of_a_process_that_has_ended_on_this_host_is_acquired_at_once(
    end, tmp_path, sleeper, capsys
):
    owner = owned_by(sleeper)
    if end == "reused":
        left_by(replace(owner, process_start=owner.process_start - 1), tmp_path)
    else:
        left_by(owner, tmp_path)
        sleeper.kill()
        os.waitid(os.P_PID, sleeper.pid, os.WEXITED | (os.WNOWAIT if end == "zombie" else 0))
    lease.take(tmp_path, here(), looks=1, seconds=1000).release()
    assert "has ended" in capsys.readouterr().out


@pytest.mark.parametrize(
    "unknown", [{"pid_namespace": "pid:[1]"}, {"boot_id": ""}, {"boot_id": "b"}]
)
def test_a_pid_of_another_host_or_container_is_not_looked_up(unknown, tmp_path, monkeypatch):
    left_by(here(pid=2**22 + 1, **unknown), tmp_path)
    waits: list[float] = []
    monkeypatch.setattr(lease.time, "sleep", waits.append)
    lease.take(tmp_path, here(), looks=2).release()
    assert len(waits) == 2


def test_a_stopped_process_keeps_its_lease_until_it_has_missed_its_renewals(
    tmp_path, sleeper, monkeypatch
):
    left = left_by(owned_by(sleeper), tmp_path)
    refused(tmp_path, here(), looks=1)
    sleeper.send_signal(signal.SIGSTOP)
    while ProcStat.read(sleeper.pid).state != "T":
        time.sleep(0.001)
    waits: list[float] = []
    monkeypatch.setattr(lease.time, "sleep", waits.append)
    held = lease.take(tmp_path, here(), looks=12)
    assert len(waits) == 12
    for check in (left.check, left.raise_if_lost):
        with pytest.raises(CheckpointError, match="no longer holds"):
            check()
    held.release()


@pytest.mark.parametrize(
    ("then", "now", "looks"),
    [
        (("7", 0), ("7", 1), 0),  # requeued
        (("7", 1), ("7", 1), 2),  # two steps of one start may run side by side
        (("7", 0), ("8", 1), 2),
        (("", 0), ("", 1), 2),
    ],
)
def test_a_requeued_job_takes_over_from_its_earlier_start_at_once(
    then, now, looks, tmp_path, monkeypatch
):
    left_by(on_another_host(slurm_job=then[0], slurm_restarts=then[1]), tmp_path)
    waits: list[float] = []
    monkeypatch.setattr(lease.time, "sleep", waits.append)
    lease.take(tmp_path, here(slurm_job=now[0], slurm_restarts=now[1]), looks=2).release()
    assert len(waits) == looks


@pytest.mark.parametrize("stale", [True, False])
def test_of_many_concurrent_runs_exactly_one_acquires_the_lease(stale, tmp_path):
    runs = 8
    for folder in (tmp_path / str(attempt) for attempt in range(20)):
        if stale:
            left_by(here(pid=2**22 + 1), folder)
        barrier = threading.Barrier(runs)
        outcomes = []

        def take(owner: Owner, folder: Path = folder, barrier=barrier, outcomes=outcomes) -> None:
            barrier.wait()
            try:
                outcomes.append(
                    lease.take(folder, owner, report=lambda _: None, looks=1, seconds=0.2)
                )
            except CheckpointError as error:
                outcomes.append(error)

        threads = [threading.Thread(target=take, args=(here(),)) for _ in range(runs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [held] = [outcome for outcome in outcomes if isinstance(outcome, Lease)]
        assert len(outcomes) == runs
        assert lease.newest(folder).record.owner == held._record.owner
        held.check()
        held.release()


def test_a_run_with_an_outdated_directory_listing_withdraws(tmp_path, monkeypatch):
    held = lease.take(tmp_path, here(), **QUICK)
    held.release()
    held = lease.take(tmp_path, here(), **QUICK)
    newest = lease.newest
    outdated = iter([None])
    monkeypatch.setattr(lease, "newest", lambda folder: next(outdated, newest(folder)))
    refused(tmp_path, here())
    monkeypatch.undo()
    assert files(tmp_path) == [".lease-00000002"]
    held.check()
    held.release()


def test_a_run_that_has_lost_the_lease_neither_renews_nor_releases_it(tmp_path):
    """Not even after the run that took it over has ended."""
    left = left_by(on_another_host(), tmp_path)
    held = lease.take(tmp_path, here(), report=lambda _: None, **QUICK)
    left.renew()
    assert left.lost
    left.release()
    record = lease.newest(tmp_path).record
    assert (record.owner, record.released) == (held._record.owner, False)
    held.check()
    held.release()

    again = left_by(on_another_host(), tmp_path, number=3)
    for _ in range(2):
        lease.take(tmp_path, here(), report=lambda _: None, **QUICK).release()
    with pytest.raises(CheckpointError, match="no longer holds"):
        again.check()


def test_a_lease_file_deleted_by_hand_is_written_again(tmp_path):
    held = lease.take(tmp_path / "saved", here(), **QUICK)
    path = tmp_path / "saved" / ".lease-00000001"
    path.unlink()
    held.check()
    assert lease.newest(tmp_path / "saved").record.owner == held._record.owner
    path.unlink()
    path.parent.rmdir()
    held.check()
    held.renew()
    assert not held.lost
    path.parent.mkdir()
    held.renew()
    refused(tmp_path / "saved", here())
    held.release()


def test_another_run_with_the_same_number_is_noticed_after_the_file_was_deleted(tmp_path):
    held = left_by(on_another_host(), tmp_path)
    (tmp_path / ".lease-00000001").unlink()
    left_by(here(), tmp_path)
    with pytest.raises(CheckpointError, match="no longer holds"):
        held.check()


def test_a_disk_that_refuses_renewals_is_reported_once_and_stops_no_run(
    tmp_path, monkeypatch, capsys
):
    held = left_by(here(), tmp_path)

    def fail(*_) -> int:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(lease.os, "pwrite", fail)
        held.renew()
        held.renew()
    assert capsys.readouterr().err.count("Read-only file system") == 1
    held.check()
    held.renew()
    assert lease.newest(tmp_path).record.renewals == 1
    held.release()


def test_a_full_disk_at_the_start_is_one_error_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lease.os, "pwrite", lambda *_: 10)
    assert "No space left" in refused(tmp_path, here())
    assert files(tmp_path) == []


KINDS = ["empty", "text", "types", "huge", "pipe", "folder", "link"]


def put(kind: str, path: Path) -> None:
    """Create an entry at ``path`` that is not a lease."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(path.parent / "nowhere")
    else:
        wrong_types = Record(here()).encode().replace(b'"pid": ', b'"pid": "x", "pod": ')
        contents = {"empty": b"", "text": b"hello", "types": wrong_types, "huge": b"\0" * 2**20}
        path.write_bytes(contents[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_an_invalid_lease_file_is_taken_over_once_it_stays_unchanged(kind, tmp_path):
    put(kind, tmp_path / ".lease-00000041")
    held = lease.take(tmp_path, here(), report=lambda _: None, **QUICK)
    assert held.number == 42
    held.release()


def assert_still_holds(held: Lease, folder: Path, number: int) -> None:
    """Check that ``held`` renews and releases file ``number``, and that another run respects it."""
    held.check()
    held.renew()
    assert (held.lost, held.number) == (False, number)
    newest = lease.newest(folder)
    assert (newest.number, newest.record) == (number, held._record)
    assert newest.record.renewals > 0
    refused(folder, here())
    held.release()
    assert lease.newest(folder).record.released
    lease.take(folder, here(), **AT_ONCE).release()


@pytest.mark.parametrize("kind", [*KINDS, "copy"])
def test_a_run_whose_lease_file_is_replaced_keeps_the_folder(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lease, "_SECOND_READ_SECONDS", 0)
    held = left_by(here(), tmp_path)
    path = tmp_path / ".lease-00000001"
    if kind == "copy":
        shutil.copy2(path, tmp_path / "copy")
        (tmp_path / "copy").rename(path)
    else:
        path.unlink()
        put(kind, path)
    assert_still_holds(held, tmp_path, 2)
    assert ".lease-00000002" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_an_invalid_lease_file_with_a_higher_number_stops_no_run(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_SECOND_READ_SECONDS", 0)
    held = left_by(here(), tmp_path)
    put(kind, tmp_path / ".lease-00000009")
    assert_still_holds(held, tmp_path, 10)


def test_a_successor_whose_file_is_being_written_is_recognised_at_the_second_read(
    tmp_path, monkeypatch
):
    held = left_by(here(), tmp_path)
    path = tmp_path / ".lease-00000002"
    path.touch()
    monkeypatch.setattr(
        lease.time, "sleep", lambda _: path.write_bytes(Record(on_another_host()).encode())
    )
    with pytest.raises(CheckpointError, match="node7"):
        held.check()
    assert files(tmp_path) == [".lease-00000001", ".lease-00000002"]


def test_a_successor_written_while_the_run_creates_a_higher_number_is_recognised(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(lease, "_SECOND_READ_SECONDS", 0)
    held = left_by(here(), tmp_path)
    path = tmp_path / ".lease-00000002"
    path.touch()
    flush = lease.disk.flush
    monkeypatch.setattr(
        lease.disk,
        "flush",
        lambda folder: (path.write_bytes(Record(on_another_host()).encode()), flush(folder)),
    )
    with pytest.raises(CheckpointError, match="node7"):
        held.check()
    assert files(tmp_path) == [".lease-00000001", ".lease-00000002"]


@pytest.mark.parametrize(
    "name", [".lease-" + "9" * 18, ".lease-100000000", ".lease-0000009", ".lease-x"]
)
def test_a_name_without_exactly_eight_digits_is_not_a_lease(name, tmp_path):
    (tmp_path / name).touch()
    held = lease.take(tmp_path, here(), **AT_ONCE)
    assert held.number == 1
    refused(tmp_path, here(), **AT_ONCE)
    held.check()
    held.release()


def test_after_the_largest_number_no_run_acquires_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lease, "_SECOND_READ_SECONDS", 0)
    held = left_by(here(), tmp_path)
    (tmp_path / ".lease-99999999").touch()
    for _ in range(2):
        held.check()
        held.renew()
    assert capsys.readouterr().err.count(".lease-99999999") == 1
    for part in (".lease-99999999", "--save"):
        assert part in refused(tmp_path, here(), report=lambda _: None)
    (tmp_path / ".lease-99999999").unlink()
    assert_still_holds(held, tmp_path, 1)


def test_a_file_in_place_of_the_folder_is_one_error(tmp_path):
    (tmp_path / "saved").write_text("a file")
    assert "--save" in refused(tmp_path / "saved", here())


def test_a_lease_does_not_affect_other_files_in_the_folder(tmp_path):
    held = lease.take(tmp_path, here(), **QUICK)
    assert names.candidates(tmp_path) == ([], [])
    assert store.newest(tmp_path) is None
    with pytest.raises(CheckpointError, match="another run writes"):
        _check_empty(tmp_path)
    path = write(tmp_path, 5)
    assert store.newest(tmp_path).path == path
    held.check()
    held.release()
    assert files(tmp_path) == [".lease-00000001", "latest", "step-00000005"]
    shutil.rmtree(path)
    (tmp_path / "latest").unlink()
    _check_empty(tmp_path)


HOLDER = """\
import sys, time
from pathlib import Path
from megatron_ring.checkpoint.lease import Owner, take
held = take(Path(sys.argv[1]), Owner.here(), seconds=0.02)
print("held", flush=True)
while True:
    time.sleep(0.02)
    held.check()
"""


def test_a_suspended_process_loses_the_lease_and_ends_when_it_continues(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    first = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    refused(tmp_path, here(), looks=100, seconds=0.1)
    first.send_signal(signal.SIGSTOP)
    while ProcStat.read(first.pid).state != "T":
        time.sleep(0.001)
    second = lease.take(tmp_path, here(), report=lambda _: None, looks=5, seconds=0.05)
    first.send_signal(signal.SIGCONT)
    assert "no longer holds" in first.communicate(timeout=60)[1]
    assert first.returncode == 1
    second.check()
    second.release()
