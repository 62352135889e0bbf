"""How processes share the making of shards: each takes whole ones, and of one that is long each takes parts.

A large compressed or parquet file is one long shard, for no process could begin in its middle. This process reads it
then, and hands its documents to the others, so many at a time that a part is a second's work. Parts are finished one
by one, as shards are: after an interruption the long shard is read again, and only parts that are missing are made.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import numpy as np

from megatron_ring.data.documents import Reading
from megatron_ring.data.processes import in_order, pool_of
from megatron_ring.data.shards import (
    ShardJob,
    ShardRecord,
    batches,
    finished,
    keep_record,
    make_in_process,
    remove,
)
from megatron_ring.data.tokens import TokenStoreWriter

_PART_CHARACTERS = 4 << 20

# Parts for each process that are read ahead: enough to keep it busy, few enough to keep in memory.
_READ_AHEAD = 2

Made = tuple[ShardJob, ShardRecord]


def made_by(processes: int, jobs: list[ShardJob], dtype: np.dtype) -> Iterator[Made]:
    """Each job with its record, in any order; stores are of ``dtype``. Raises DataError as reading does.

    Long is a job of more than half an even share: made by one process, it could have the others wait for it.
    """
    share = sum(job.file_bytes for job in jobs) / processes
    short = [job for job in jobs if job.file_bytes <= share / 2]
    long = [job for job in jobs if job.file_bytes > share / 2]
    with pool_of(processes) as pool:
        yield from in_order(pool, make_in_process, short)
        yield from _made_in_parts(pool, processes, long, dtype)


@dataclass(frozen=True)
class _Texts:
    """Documents that were read already, in the place of a Piece."""

    texts: list[str]

    def documents(self, reading: Reading) -> Iterator[str]:
        yield from self.texts


@dataclass(frozen=True)
class _Part(ShardJob):
    whole: ShardJob


def _made_in_parts(
    pool: Executor, processes: int, jobs: list[ShardJob], dtype: np.dtype
) -> Iterator[Made]:
    passed_over = {job.prefix: ([], Counter()) for job in jobs}
    parts = chain.from_iterable(_parts(job, *passed_over[job.prefix]) for job in jobs)
    made = in_order(pool, _make_part, parts, _READ_AHEAD * processes)
    for job, made_of_job in groupby(made, key=lambda part_and_record: part_and_record[0].whole):
        yield job, _joined(job, made_of_job, *passed_over[job.prefix], dtype)


def _parts(job: ShardJob, skipped: list[str], left_out: Counter[str]) -> Iterator[_Part]:
    """The documents of ``job``, at least one part. What is passed over goes into the last two
    arguments."""
    found = job.reading.texts(job.shard, skipped, left_out)
    for number, texts in enumerate(batches(found, _PART_CHARACTERS)):
        prefix = Path(f"{job.prefix}-{_PART_CHARACTERS}-{number}")
        yield _Part((_Texts(texts),), job.reading, job.tokenizer_file, prefix, job.begin, job)


def _make_part(part: _Part) -> ShardRecord:
    return finished(part) or make_in_process(part)


def _joined(
    job: ShardJob, made: Iterable[Made], skipped: list[str], left_out: Counter[str], dtype: np.dtype
) -> ShardRecord:
    """Write the shard from its parts, and then its record; the parts are not needed any more."""
    # By their prefixes: the texts of all of them would not fit into memory.
    records = {part.prefix: record for part, record in made}
    with TokenStoreWriter(job.prefix, dtype) as writer:
        for prefix in records:
            writer.add_store(prefix)
    counts = (
        [getattr(record, name) for record in records.values()]
        for name in ("documents", "tokens", "bytes")
    )
    record = keep_record(job.prefix, *map(sum, counts), skipped, left_out)
    for prefix in records:
        remove(prefix)
    return record
