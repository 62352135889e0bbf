"""Make shards with a pool of worker processes; a large shard is divided among all of them.

A large compressed or parquet file is one large shard, because no process could begin reading in its
middle. This process then reads it and hands its documents to the workers, in parts of about one
second's work each. Parts are finished one by one, as shards are: after an interruption the large
file is read again, and only the missing parts are made.
"""

import math
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

import numpy as np

from megatron_ring.data.documents import Reading
from megatron_ring.data.shards import (
    ShardJob,
    ShardRecord,
    batches,
    finished_record,
    make_shard_in_worker,
    remove_shard,
    write_record,
)
from megatron_ring.data.tokens import TokenStoreWriter
from megatron_ring.errors import DataError

_PART_CHARACTERS = 4 << 20

# Parts read ahead per process: enough to keep it busy, few enough to keep in memory.
_PARTS_AHEAD = 2

MadeShard = tuple[ShardJob, ShardRecord]


def make_shards(processes: int, jobs: list[ShardJob], dtype: np.dtype) -> Iterator[MadeShard]:
    """Make all shards with ``processes`` workers and yield each job with its record, in any order.

    Stores have the type ``dtype``. A job of more than half of one process's even share is divided
    among all processes, because the others might otherwise wait for it. Raises DataError as reading
    does.
    """
    share = sum(job.file_bytes for job in jobs) / processes
    small = [job for job in jobs if job.file_bytes <= share / 2]
    large = [job for job in jobs if job.file_bytes > share / 2]
    with process_pool(processes) as pool:
        yield from run_in_order(pool, make_shard_in_worker, small)
        yield from _make_in_parts(pool, processes, large, dtype)


@contextmanager
def process_pool(processes: int) -> Iterator[Executor]:
    """Start ``processes`` worker processes, which end with the ``with`` block.

    They are spawned, because a forked copy of a program with threads may hang. Raises DataError
    when one of them was killed.
    """
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_follow_parent
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps because memory ran out. Set --workers lower and "
            "run the same command again; finished shards are kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def run_in_order(
    pool: Executor, work: Callable, jobs: Iterable, ahead: float = math.inf
) -> Iterator[tuple]:
    """Yield each job with the result of ``work(job)`` in ``pool``, in the order of ``jobs``.

    At most ``ahead`` jobs are taken from ``jobs`` beyond the first unfinished one. Raises what the
    first failed job raised.
    """
    submitted: deque[tuple[object, Future]] = deque()
    for job in jobs:
        submitted.append((job, pool.submit(work, job)))
        if len(submitted) > ahead:
            yield _wait_for(*submitted.popleft())
    while submitted:
        yield _wait_for(*submitted.popleft())


def _wait_for(job: object, future: Future) -> tuple:
    # A function, so that the suspended generator keeps no finished job, which may hold its texts.
    return job, future.result()


def _follow_parent() -> None:
    """Leave interrupts to the parent process and end when it ends, in whatever way.

    A pool's workers would otherwise wait for work forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_exit_with, args=(parent_process(),), daemon=True).start()


def _exit_with(parent: BaseProcess) -> None:
    connection.wait([parent.sentinel])
    os._exit(1)


@dataclass(frozen=True)
class _TextsRead:
    """Documents that were read already; takes the place of a Piece in a shard."""

    texts: list[str]

    def documents(self, reading: Reading) -> Iterator[str]:
        yield from self.texts


@dataclass(frozen=True)
class _PartJob(ShardJob):
    """A part of the shard of the job ``whole``."""

    whole: ShardJob


def _make_in_parts(
    pool: Executor, processes: int, jobs: list[ShardJob], dtype: np.dtype
) -> Iterator[MadeShard]:
    """Make each shard from parts. Reading a job's parts fills its skipped and left-out counts."""
    not_read: dict[Path, tuple[list[str], Counter[str]]] = {
        job.prefix: ([], Counter()) for job in jobs
    }
    part_jobs = chain.from_iterable(_part_jobs(job, *not_read[job.prefix]) for job in jobs)
    parts = run_in_order(pool, _make_part, part_jobs, _PARTS_AHEAD * processes)
    for job, parts_of_job in groupby(parts, key=lambda part_and_record: part_and_record[0].whole):
        yield job, _join_parts(job, parts_of_job, *not_read[job.prefix], dtype)


def _part_jobs(job: ShardJob, skipped: list[str], left_out: Counter[str]) -> Iterator[_PartJob]:
    """Read ``job`` and yield its documents as jobs, at least one.

    Documents that are skipped or left out are added to the last two arguments.
    """
    all_texts = job.reading.texts(job.shard, skipped, left_out)
    for number, texts in enumerate(batches(all_texts, _PART_CHARACTERS)):
        prefix = Path(f"{job.prefix}-{_PART_CHARACTERS}-{number}")
        shard = (_TextsRead(texts),)
        yield _PartJob(shard, job.reading, job.tokenizer_file, prefix, job.begin, job)


def _make_part(part: _PartJob) -> ShardRecord:
    return finished_record(part) or make_shard_in_worker(part)


def _join_parts(
    job: ShardJob,
    parts: Iterable[MadeShard],
    skipped: list[str],
    left_out: Counter[str],
    dtype: np.dtype,
) -> ShardRecord:
    """Write the shard from its parts, then its record, and delete the parts."""
    # Only prefixes are kept: the jobs hold the texts, which would not fit into memory together.
    records = {part.prefix: record for part, record in parts}
    with TokenStoreWriter(job.prefix, dtype) as writer:
        for prefix in records:
            writer.add_store(prefix)
    record = write_record(
        job.prefix,
        sum(record.documents for record in records.values()),
        sum(record.tokens for record in records.values()),
        sum(record.bytes for record in records.values()),
        skipped,
        left_out,
    )
    for prefix in records:
        remove_shard(prefix)
    return record
