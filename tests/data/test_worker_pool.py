"""A long shard is made in parts: by all processes, to the same bytes, after an interruption only those that lack."""

import gzip
import json
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from megatron_ring.data import corpus as cutting
from megatron_ring.data import prepare as preparing
from megatron_ring.data import worker_pool
from megatron_ring.data.corpus import Corpus, gather
from megatron_ring.data.documents import Reading
from megatron_ring.data.prepare import Prepared, prepare, work_folder
from megatron_ring.data.shards import jobs
from megatron_ring.errors import DataError
from tests.data.text import TEXT


class ThisProcess(Executor):
    """A pool in this process, which tests can look into."""

    def submit(self, work, *arguments) -> Future:
        future = Future()
        future.set_result(work(*arguments))
        return future


@contextmanager
def _this_process(processes: int) -> Iterator[Executor]:
    yield ThisProcess()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of two or three documents, every file a shard, and processes that any work is enough for."""
    monkeypatch.setattr(cutting, "SHARD_BYTES", 1)
    monkeypatch.setattr(worker_pool, "_PART_CHARACTERS", 2 * len(TEXT))
    monkeypatch.setattr(preparing, "_BYTES_FOR_A_PROCESS", 1)


@pytest.fixture
def made(monkeypatch) -> list[Path]:
    """The prefixes of what is made, here instead of in other processes."""
    prefixes, make = [], worker_pool.make_in_process
    monkeypatch.setattr(
        worker_pool, "make_in_process", lambda job: prefixes.append(job.prefix) or make(job)
    )
    monkeypatch.setattr(worker_pool, "pool_of", _this_process)
    return prefixes


def write_lines(file: Path, lines: list[str]) -> Path:
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    return file


def lines_of(count: int) -> list[str]:
    return [json.dumps({"text": f"{number} {TEXT[number:]}"}) for number in range(count)]


def content(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")}


def prepared_by(
    workers: int, corpus: Corpus, tokenizer, folder: Path
) -> tuple[Prepared, dict[str, bytes]]:
    found = prepare(corpus, folder / str(workers) / "P", tokenizer, workers)
    return found, content(folder / str(workers) / "P")


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    """Two long files with bad lines, and short ones around them."""
    (tmp_path / "text").mkdir()
    for name, count in (("b", 40), ("d", 33)):
        lines = lines_of(count)
        write_lines(tmp_path / "text" / f"{name}.jsonl.gz", [*lines[:20], "rubbish", *lines[20:]])
    for name in "ace":
        (tmp_path / "text" / f"{name}.txt").write_text(name)
    return gather([tmp_path / "text"], reading=Reading(on_error="skip"))


def test_two_processes_write_what_one_writes(corpus, tokenizer, tmp_path):
    expected = prepared_by(1, corpus, tokenizer, tmp_path)
    assert prepared_by(2, corpus, tokenizer, tmp_path) == expected
    assert [message.split(": ")[0] for message in expected[0].skipped] == [
        f"{tmp_path}/text/{name}.jsonl.gz:21" for name in "bd"
    ]


def test_long_files_are_made_in_parts_and_short_ones_whole(corpus, tokenizer, tmp_path, made):
    expected = prepared_by(1, corpus, tokenizer, tmp_path)
    assert made == []
    assert prepared_by(2, corpus, tokenizer, tmp_path) == expected
    parts = [prefix.name.split("-") for prefix in made if "-" in prefix.name]
    assert len(made) - len(parts) == 3
    assert [int(number) for *_, number in parts] == [*range(14), *range(12)]


def test_parts_are_gone_when_they_are_joined(corpus, tokenizer, tmp_path, made):
    tokenizer.save(tmp_path / "the.model")
    (tmp_path / "work").mkdir()
    work = jobs(corpus, tokenizer, tmp_path / "the.model", tmp_path / "work")
    records = dict(worker_pool.made_by(2, work, np.dtype(np.uint16)))
    assert set(records) == set(work)
    left = {path.name for path in (tmp_path / "work").iterdir()}
    assert left == {
        f"{job.prefix.name}.{suffix}" for job in work for suffix in ("bin", "idx", "json")
    }


def test_after_an_interruption_only_missing_parts_are_made(
    corpus, tokenizer, tmp_path, made, monkeypatch
):
    expected = prepared_by(1, corpus, tokenizer, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(worker_pool, "_joined", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared_by(2, corpus, tokenizer, tmp_path)
    lost = made[3]
    next(work_folder(tmp_path / "2" / "P").glob(f"{lost.name}.json")).unlink()
    finished = made.copy()
    made.clear()
    assert prepared_by(2, corpus, tokenizer, tmp_path) == expected
    assert lost in made
    assert not set(made) & (set(finished) - {lost})


def test_a_bad_line_stops_what_is_made_in_parts(corpus, tokenizer, tmp_path, made):
    with pytest.raises(DataError, match=r"b\.jsonl\.gz:21: not a line of JSON"):
        prepared_by(2, Corpus(corpus.files), tokenizer, tmp_path)
    assert made, "what came before it"


def test_a_long_file_without_documents_is_made_too(tokenizer, tmp_path, made):
    empty = write_lines(tmp_path / "a.jsonl.gz", [f"rubbish {number}" for number in range(200)])
    one = write_lines(tmp_path / "b.jsonl.gz", lines_of(1))
    found, _ = prepared_by(
        2, gather([empty, one], reading=Reading(on_error="skip")), tokenizer, tmp_path
    )
    assert (found.manifest.documents, found.manifest.skipped) == (1, 200)
    assert any("-" in prefix.name for prefix in made)
