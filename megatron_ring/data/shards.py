"""One shard of a corpus as a token store of its own, and the record by which a later run knows it as finished.

A shard's name is a hash of everything its tokens follow from: the tokenizer, the JSON key, and the place, size and
time of change of its files. So a run that was cut short finds what it finished, and nothing that has changed since.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from megatron_ring.data.corpus import Corpus, Reading, Shard
from megatron_ring.data.replace_file import replace_file
from megatron_ring.data.token_index import idx_path
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokens import TokenStoreWriter, bin_path, token_dtype
from megatron_ring.untrusted import UntrustedInputError, parse_json, read_bytes

# The tokenizer is not called for each short text.
_BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class ShardJob:
    """What a process needs to know to make one shard.

    ``prefix`` is where its store goes, without a suffix, ``begin`` the ids before every document.
    """

    shard: Shard
    reading: Reading
    tokenizer_file: Path
    prefix: Path
    begin: tuple[int, ...]

    @property
    def file_bytes(self) -> int:
        """Bytes of the files that the shard is made of."""
        return sum(piece.stop - piece.start for piece in self.shard)


@dataclass(frozen=True)
class ShardRecord:
    """The counts of a finished shard, what was passed over in it, and the size of its ``.bin``.

    ``left_out`` counts by reason what is no document to be read (formats.LeftOut).
    """

    documents: int
    tokens: int
    bytes: int
    skipped: list[str]
    stored_bytes: int
    left_out: Mapping[str, int] = field(default_factory=dict)


def jobs(
    corpus: Corpus,
    tokenizer: Tokenizer,
    tokenizer_file: Path,
    folder: Path,
    begin: tuple[int, ...] = (),
) -> list[ShardJob]:
    """A job for each shard of ``corpus``, to be kept in ``folder`` until all are joined."""
    reading = corpus.reading
    follows_from = (
        *(tokenizer.fingerprint, tokenizer.end_of_document, *begin),
        *(reading.json_key, reading.max_document_bytes, *reading.suffixes),
    )
    return [
        ShardJob(shard, corpus.reading, tokenizer_file, folder / _name(shard, *follows_from), begin)
        for shard in corpus.shards()
    ]


def finished(job: ShardJob) -> ShardRecord | None:
    """The record of a shard that was finished, None where it is still to be made, or a crash left half of it."""
    try:
        record = parse_json(read_bytes(_record_path(job.prefix)), ShardRecord)
        # What was skipped then may have to stop us now; what had nothing to skip serves either way.
        wanted = not record.skipped or job.reading.on_error == "skip"
        whole = (
            bin_path(job.prefix).stat().st_size == record.stored_bytes
            and idx_path(job.prefix).exists()
        )
    except (OSError, UntrustedInputError):
        return None
    return record if whole and wanted else None


def make_in_process(job: ShardJob) -> ShardRecord:
    """``make`` in a process of its own, which loads the tokenizer once for all its shards."""
    return make(job, _loaded(job.tokenizer_file))


def make(job: ShardJob, tokenizer: Tokenizer) -> ShardRecord:
    """Write the shard and then its record. Raises DataError as reading does."""
    skipped: list[str] = []
    left_out: Counter[str] = Counter()
    documents = tokens = text_bytes = 0
    with TokenStoreWriter(job.prefix, token_dtype(tokenizer.vocab_size)) as writer:
        for texts in batches(job.reading.texts(job.shard, skipped, left_out), _BATCH_CHARACTERS):
            for text, ids in zip(texts, tokenizer.encode_documents(texts, job.begin)):
                writer.add_document(ids)
                documents, tokens, text_bytes = (
                    documents + 1,
                    tokens + len(ids),
                    text_bytes + len(text.encode()),
                )
    return keep_record(job.prefix, documents, tokens, text_bytes, skipped, left_out)


def keep_record(
    prefix: Path,
    documents: int,
    tokens: int,
    text_bytes: int,
    skipped: list[str],
    left_out: Mapping[str, int],
) -> ShardRecord:
    """Write the record of the store at ``prefix``, which is finished from then on."""
    stored_bytes = bin_path(prefix).stat().st_size
    record = ShardRecord(documents, tokens, text_bytes, skipped, stored_bytes, dict(left_out))
    replace_file(_record_path(prefix), json.dumps(asdict(record)).encode())
    return record


def remove(prefix: Path) -> None:
    """Delete a shard that has gone into a larger store."""
    for path in (_record_path(prefix), bin_path(prefix), idx_path(prefix)):
        path.unlink()


# As many as a process has, which is one.
_loaded = cache(Tokenizer.load)


def _record_path(prefix: Path) -> Path:
    return Path(f"{prefix}.json")


def _name(shard: Shard, *options: str | int) -> str:
    files = [
        (str(piece.file.absolute()), piece.start, piece.stop, *_state(piece.file))
        for piece in shard
    ]
    return hashlib.sha256(json.dumps((options, files)).encode()).hexdigest()[:32]


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Texts in lists of about so many characters; the last list may be empty."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    yield batch
