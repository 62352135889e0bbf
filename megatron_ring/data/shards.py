"""Tokenize one shard of a corpus into a token store of its own, with a record once it is finished.

A shard's name is a hash of everything that determines its tokens: the tokenizer, the reading
options, and the path, size and modification time of its files. So a run that was interrupted
reuses the shards it had finished, and none whose input has changed since.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, field
from functools import cache
from pathlib import Path

from megatron_ring.data.corpus import Corpus, Shard
from megatron_ring.data.documents import Reading
from megatron_ring.data.map_cache import FileState
from megatron_ring.data.token_index import idx_path
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokens import TokenStoreWriter, bin_path, token_dtype
from megatron_ring.untrusted import UntrustedInputError, parse_json, read_bytes, replace_file

# Short texts are tokenized together, to call the tokenizer less often.
_BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class ShardJob:
    """Everything a process needs to make one shard.

    ``prefix`` is the path of the shard's store, without a suffix; ``begin`` are the ids before
    every document.
    """

    shard: Shard
    reading: Reading
    tokenizer_file: Path
    prefix: Path
    begin: tuple[int, ...]

    @property
    def file_bytes(self) -> int:
        """Bytes of the input files that belong to the shard."""
        return sum(piece.stop - piece.start for piece in self.shard)


@dataclass(frozen=True)
class ShardRecord:
    """The counts of a finished shard, messages about skipped documents, and the size of its .bin.

    ``left_out`` counts, by reason, input that is not read (file_formats.LeftOut).
    """

    documents: int
    tokens: int
    bytes: int
    skipped: list[str]
    stored_bytes: int
    left_out: Mapping[str, int] = field(default_factory=dict)


def shard_jobs(
    corpus: Corpus,
    tokenizer: Tokenizer,
    tokenizer_file: Path,
    folder: Path,
    begin: tuple[int, ...] = (),
) -> list[ShardJob]:
    """Return a job for each shard of ``corpus``; the shards stay in ``folder`` until joined."""
    reading = corpus.reading
    determines_tokens = (
        tokenizer.fingerprint,
        tokenizer.end_of_document,
        *begin,
        reading.json_key,
        reading.max_document_bytes,
        *reading.suffixes,
    )
    jobs = []
    for shard in corpus.shards():
        prefix = folder / _shard_name(shard, *determines_tokens)
        jobs.append(ShardJob(shard, reading, tokenizer_file, prefix, begin))
    return jobs


def finished_record(job: ShardJob) -> ShardRecord | None:
    """Return the record of a finished shard, None for one to be made or one that a crash left."""
    try:
        record = parse_json(read_bytes(_record_path(job.prefix)), ShardRecord)
        # A shard with skipped documents must be made again if an unreadable one now stops the run.
        is_usable = not record.skipped or job.reading.on_error == "skip"
        is_complete = (
            bin_path(job.prefix).stat().st_size == record.stored_bytes
            and idx_path(job.prefix).exists()
        )
    except (OSError, UntrustedInputError):
        return None
    return record if is_complete and is_usable else None


def make_shard_in_worker(job: ShardJob) -> ShardRecord:
    """Run ``make_shard`` in a worker process, which loads the tokenizer once for all its shards."""
    return make_shard(job, _load_tokenizer(job.tokenizer_file))


def make_shard(job: ShardJob, tokenizer: Tokenizer) -> ShardRecord:
    """Write the shard and then its record. Raises DataError as reading does."""
    skipped: list[str] = []
    left_out: Counter[str] = Counter()
    documents = 0
    tokens = 0
    text_bytes = 0
    all_texts = job.reading.texts(job.shard, skipped, left_out)
    with TokenStoreWriter(job.prefix, token_dtype(tokenizer.vocab_size)) as writer:
        for texts in batches(all_texts, _BATCH_CHARACTERS):
            for text, ids in zip(texts, tokenizer.encode_documents(texts, job.begin)):
                writer.add_document(ids)
                documents += 1
                tokens += len(ids)
                text_bytes += len(text.encode())
    return write_record(job.prefix, documents, tokens, text_bytes, skipped, left_out)


def write_record(
    prefix: Path,
    documents: int,
    tokens: int,
    text_bytes: int,
    skipped: list[str],
    left_out: Mapping[str, int],
) -> ShardRecord:
    """Write the record of the store at ``prefix``, which marks it as finished, and return it."""
    stored_bytes = bin_path(prefix).stat().st_size
    record = ShardRecord(documents, tokens, text_bytes, skipped, stored_bytes, dict(left_out))
    replace_file(_record_path(prefix), json.dumps(asdict(record)).encode())
    return record


def remove_shard(prefix: Path) -> None:
    """Delete a shard that has been copied into a larger store."""
    for path in (_record_path(prefix), bin_path(prefix), idx_path(prefix)):
        path.unlink()


# One entry per process: all jobs of a process use the same tokenizer.
_load_tokenizer = cache(Tokenizer.load)


def _record_path(prefix: Path) -> Path:
    return Path(f"{prefix}.json")


def _shard_name(shard: Shard, *options: str | int) -> str:
    files = [
        (str(piece.file.absolute()), piece.start, piece.stop, *astuple(FileState.of(piece.file)))
        for piece in shard
    ]
    return hashlib.sha256(json.dumps((options, files)).encode()).hexdigest()[:32]


def batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Group texts into lists of about ``characters`` characters; the last list may be empty."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch = []
            size = 0
    yield batch
