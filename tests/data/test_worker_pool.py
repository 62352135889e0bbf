"""The worker pool: results in order, errors and killed workers raised, large shards in parts."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from megatron_ring.data import corpus as corpus_module
from megatron_ring.data import prepare as prepare_module
from megatron_ring.data import worker_pool
from megatron_ring.data.corpus import Corpus, gather
from megatron_ring.data.documents import Reading
from megatron_ring.data.prepare import Prepared, prepare, work_folder
from megatron_ring.data.shards import shard_jobs
from megatron_ring.data.worker_pool import process_pool, run_in_order
from megatron_ring.errors import DataError
from tests.data.text import TEXT


def return_first_late(number: int) -> int:
    time.sleep(0.3 if number == 0 else 0)
    return number


def fail_from_two(number: int) -> int:
    if number >= 2:
        raise DataError(f"job {number}")
    return number


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("ahead", [0, 1, 9])
def test_results_come_in_job_order_with_their_jobs(ahead):
    with process_pool(2) as pool:
        results = list(run_in_order(pool, return_first_late, range(4), ahead))
    assert results == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_jobs_are_taken_at_most_ahead_of_the_first_unfinished_one():
    taken = []

    def jobs() -> Iterator[int]:
        for number in range(9):
            taken.append(number)
            yield number

    with process_pool(1) as pool:
        results = run_in_order(pool, return_first_late, jobs(), ahead=2)
        for number in range(3):
            assert next(results) == (number, number)
            assert taken == list(range(number + 3))


def test_the_error_of_the_first_failed_job_is_raised():
    with process_pool(2) as pool:
        results = run_in_order(pool, fail_from_two, range(9))
        assert [next(results), next(results)] == [(0, 0), (1, 1)]
        with pytest.raises(DataError, match="job 2"):
            next(results)


def test_a_killed_worker_is_a_data_error():
    with (
        pytest.raises(DataError, match=r"was killed.* memory.* --workers"),
        process_pool(2) as pool,
    ):
        list(run_in_order(pool, die, range(2)))


PARENT = """
import os, signal
from megatron_ring.data.worker_pool import process_pool, run_in_order
def getpid(_):
    return os.getpid()
if __name__ == "__main__":
    with process_pool(1) as pool:
        for _, process_id in run_in_order(pool, getpid, range(1)):
            print(process_id, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.run(
        [sys.executable, str(tmp_path / "parent.py")], capture_output=True, text=True, timeout=60
    )
    child = int(parent.stdout)
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(process_id: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        with open(f"/proc/{process_id}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- large shards in parts ----


class InProcessExecutor(Executor):
    """A pool that runs its work in this process, so that tests can observe it."""

    def submit(self, work, *arguments) -> Future:
        future = Future()
        future.set_result(work(*arguments))
        return future


@contextmanager
def in_process_pool(processes: int) -> Iterator[Executor]:
    yield InProcessExecutor()


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of two or three documents, each file a shard, and workers for any amount of work."""
    monkeypatch.setattr(corpus_module, "SHARD_BYTES", 1)
    monkeypatch.setattr(worker_pool, "_PART_CHARACTERS", 2 * len(TEXT))
    monkeypatch.setattr(prepare_module, "_BYTES_PER_PROCESS", 1)


@pytest.fixture
def made(monkeypatch, small_parts) -> list[Path]:
    """Prefixes of the shards and parts that are made, in this process instead of workers."""
    prefixes: list[Path] = []
    make = worker_pool.make_shard_in_worker

    def recording_make(job):
        prefixes.append(job.prefix)
        return make(job)

    monkeypatch.setattr(worker_pool, "make_shard_in_worker", recording_make)
    monkeypatch.setattr(worker_pool, "process_pool", in_process_pool)
    return prefixes


def write_lines(file: Path, lines: list[str]) -> Path:
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    return file


def json_lines(count: int) -> list[str]:
    return [json.dumps({"text": f"{number} {TEXT[number:]}"}) for number in range(count)]


def content(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")}


def prepared_by(
    workers: int, corpus: Corpus, tokenizer, folder: Path
) -> tuple[Prepared, dict[str, bytes]]:
    prefix = folder / str(workers) / "P"
    prepared = prepare(corpus, prefix, tokenizer, workers)
    return prepared, content(prefix)


@pytest.fixture
def corpus(tmp_path, small_parts) -> Corpus:
    """Two large files, each with a bad line, and small files around them."""
    (tmp_path / "text").mkdir()
    for name, count in (("b", 40), ("d", 33)):
        lines = json_lines(count)
        write_lines(tmp_path / "text" / f"{name}.jsonl.gz", [*lines[:20], "rubbish", *lines[20:]])
    for name in "ace":
        (tmp_path / "text" / f"{name}.txt").write_text(name)
    return gather([tmp_path / "text"], reading=Reading(on_error="skip"))


def test_two_processes_write_the_same_files_as_one(corpus, tokenizer, tmp_path):
    expected = prepared_by(1, corpus, tokenizer, tmp_path)
    assert prepared_by(2, corpus, tokenizer, tmp_path) == expected
    assert [message.split(": ")[0] for message in expected[0].skipped] == [
        f"{tmp_path}/text/{name}.jsonl.gz:21" for name in "bd"
    ]


def test_large_files_are_made_in_parts_and_small_ones_whole(corpus, tokenizer, tmp_path, made):
    expected = prepared_by(1, corpus, tokenizer, tmp_path)
    assert made == []
    assert prepared_by(2, corpus, tokenizer, tmp_path) == expected
    parts = [prefix.name.split("-") for prefix in made if "-" in prefix.name]
    assert len(made) - len(parts) == 3
    assert [int(number) for *_, number in parts] == [*range(14), *range(12)]


def test_parts_are_deleted_when_they_are_joined(corpus, tokenizer, tmp_path, made):
    tokenizer.save(tmp_path / "the.model")
    (tmp_path / "work").mkdir()
    jobs = shard_jobs(corpus, tokenizer, tmp_path / "the.model", tmp_path / "work")
    records = dict(worker_pool.make_shards(2, jobs, np.dtype(np.uint16)))
    assert set(records) == set(jobs)
    left = {path.name for path in (tmp_path / "work").iterdir()}
    assert left == {
        f"{job.prefix.name}.{suffix}" for job in jobs for suffix in ("bin", "idx", "json")
    }


def test_after_an_interruption_only_missing_parts_are_made(
    corpus, tokenizer, tmp_path, made, monkeypatch
):
    expected = prepared_by(1, corpus, tokenizer, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(worker_pool, "_join_parts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared_by(2, corpus, tokenizer, tmp_path)
    lost = made[3]
    next(work_folder(tmp_path / "2" / "P").glob(f"{lost.name}.json")).unlink()
    finished = made.copy()
    made.clear()
    assert prepared_by(2, corpus, tokenizer, tmp_path) == expected
    assert lost in made
    assert not set(made) & (set(finished) - {lost})


def test_a_bad_line_of_a_large_file_is_raised(corpus, tokenizer, tmp_path, made):
    with pytest.raises(DataError, match=r"b\.jsonl\.gz:21: not a line of JSON"):
        prepared_by(2, Corpus(corpus.files), tokenizer, tmp_path)
    assert made, "the parts before the bad line"


def test_a_large_file_without_documents_is_made_too(tokenizer, tmp_path, made):
    empty = write_lines(tmp_path / "a.jsonl.gz", [f"rubbish {number}" for number in range(200)])
    one = write_lines(tmp_path / "b.jsonl.gz", json_lines(1))
    corpus = gather([empty, one], reading=Reading(on_error="skip"))
    prepared, _ = prepared_by(2, corpus, tokenizer, tmp_path)
    assert (prepared.manifest.documents, prepared.manifest.skipped) == (1, 200)
    assert any("-" in prefix.name for prefix in made)
