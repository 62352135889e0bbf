"""Prepare a token store from a corpus: P.bin, P.idx, P.json, and its tokenizer in the same folder.

The corpus is cut into shards (corpus.py), which are tokenized by one process (shards.py) or several
(worker_pool.py) and then joined in order.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from megatron_ring.data.corpus import Corpus, python_library
from megatron_ring.data.manifest import (
    Manifest,
    manifest_path,
    read_manifest,
    tokenizer_path,
    write_manifest,
)
from megatron_ring.data.shards import (
    ShardJob,
    ShardRecord,
    finished_record,
    make_shard,
    shard_jobs,
)
from megatron_ring.data.token_index import idx_path
from megatron_ring.data.tokenizer import Tokenizer, beside
from megatron_ring.data.tokenizer_training import train_tokenizer
from megatron_ring.data.tokens import TokenStoreWriter, bin_path, token_dtype
from megatron_ring.data.worker_pool import make_shards
from megatron_ring.errors import DataError

DEFAULT_VOCAB_SIZE = 4096

# A process takes a second to start, which does not pay off for less work than this.
_BYTES_PER_PROCESS = 8 << 20


@dataclass(frozen=True)
class Prepared:
    """The manifest of the store that was written, and a message for each skipped document.

    A message names file and line.
    """

    manifest: Manifest
    skipped: tuple[str, ...]


def fit_tokenizer(corpus: Corpus, vocab_size: int, progress: bool = False) -> Tokenizer:
    """Train a tokenizer of ``vocab_size`` ids on ``corpus``.

    Raises DataError as reading and training do.
    """
    return train_tokenizer(_training_texts(corpus, progress), vocab_size)


def prepare(
    corpus: Corpus,
    prefix: str | Path,
    tokenizer: Tokenizer,
    workers: int = 1,
    progress: bool = False,
    prepend_bos: Literal["auto", "on", "off"] = "auto",
) -> Prepared:
    """Write every document of ``corpus``, each followed by the end-of-document id, to a store.

    ``prepend_bos`` selects the ids before each document: see Tokenizer.begin_of_document. The
    number of ``workers``, processes that tokenize, does not affect the files.

    An interruption at any moment leaves no store that looks complete; finished shards stay in
    ``work_folder(prefix)``, and the next call continues from there. Raises DataError for text that
    cannot be read and for another tokenizer in the folder.
    """
    tokenizer_file = beside(prefix, tokenizer.file_name)
    begin = tokenizer.begin_of_document(prepend_bos)
    tokenizer.save(tokenizer_file)
    jobs = shard_jobs(corpus, tokenizer, tokenizer_file, work_folder(prefix), begin)
    records = _make_shards(jobs, tokenizer, workers, progress)
    manifest = _manifest(records, corpus, tokenizer, begin)
    if not manifest.documents and manifest.skipped:
        raise DataError(f"nothing to write to {prefix}: {_all_skipped(manifest.skipped, corpus)}")
    if not manifest.documents:
        raise DataError(f"nothing to write to {prefix}: every document is empty. Set --input.")
    _join(jobs, prefix, token_dtype(tokenizer.vocab_size))
    write_manifest(prefix, manifest)
    shutil.rmtree(work_folder(prefix), ignore_errors=True)
    return Prepared(manifest, tuple(chain.from_iterable(record.skipped for record in records)))


def work_folder(prefix: str | Path) -> Path:
    """Return ``P.work``, the folder of finished shards of a store that is being written."""
    return Path(f"{prefix}.work")


def python_library_prefix(folder: str | Path) -> Path:
    """Return the prefix of the store of Python's own library under ``folder``."""
    return Path(folder) / "python-library" / "tokens"


def prepare_python_library(folder: str | Path, workers: int = 1, progress: bool = False) -> Path:
    """Return the prefix of a store of Python's own library under ``folder``, written if missing.

    Safe to call from any number of processes at once: one writes while the others block on a file
    lock. After an interruption the next call starts over. The store has a folder of its own,
    because a folder has one tokenizer.
    """
    prefix = python_library_prefix(folder)
    with _locked(prefix.parent):
        if not _is_prepared(prefix):
            # An interrupted call, perhaps of another Python, may have left one; no store uses it.
            tokenizer_path(prefix).unlink(missing_ok=True)
            corpus = python_library()
            tokenizer = fit_tokenizer(corpus, DEFAULT_VOCAB_SIZE, progress)
            prepare(corpus, prefix, tokenizer, workers, progress)
    return prefix


def _is_prepared(prefix: Path) -> bool:
    parts = bin_path(prefix), idx_path(prefix), tokenizer_path(prefix)
    return read_manifest(prefix) is not None and all(path.exists() for path in parts)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``folder``; blocks until it is free.

    The operating system releases the lock when the process ends, in whatever way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # O_NOFOLLOW: a link of this name could lead to another file, which must not be opened to write.
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(folder / ".lock", flags, 0o666), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_shards(
    jobs: list[ShardJob], tokenizer: Tokenizer, workers: int, progress: bool
) -> list[ShardRecord]:
    """Return the record of each job in order; shards that an earlier call finished are reused."""
    records = {job.prefix: record for job in jobs if (record := finished_record(job))}
    # A file named twice gives two jobs with one prefix: one shard, joined twice.
    missing = list({job.prefix: job for job in jobs if job.prefix not in records}.values())
    missing_bytes = sum(job.file_bytes for job in missing)
    processes = min(workers, missing_bytes // _BYTES_PER_PROCESS)
    if processes > 1:
        made = make_shards(processes, missing, token_dtype(tokenizer.vocab_size))
    else:
        made = ((job, make_shard(job, tokenizer)) for job in missing)
    with _progress_bar("tokens", missing_bytes, progress) as bar:
        for job, record in made:
            records[job.prefix] = record
            bar.update(job.file_bytes)
    return [records[job.prefix] for job in jobs]


def _manifest(
    records: list[ShardRecord], corpus: Corpus, tokenizer: Tokenizer, begin: tuple[int, ...]
) -> Manifest:
    left_out = corpus.left_out.copy()
    for record in records:
        left_out.update(record.left_out)
    return Manifest(
        tokenizer_sha256=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        documents=sum(record.documents for record in records),
        tokens=sum(record.tokens for record in records),
        bytes=sum(record.bytes for record in records),
        skipped=sum(len(record.skipped) for record in records),
        end_of_document=tokenizer.end_of_document,
        begin_of_document=begin,
        left_out=dict(sorted(left_out.items())),
    )


def _join(jobs: list[ShardJob], prefix: str | Path, dtype: np.dtype) -> None:
    with TokenStoreWriter(prefix, dtype) as writer:
        for job in jobs:
            writer.add_store(job.prefix)
        # An older store is about to be replaced; its manifest must not remain beside the new one.
        manifest_path(prefix).unlink(missing_ok=True)


def _training_texts(corpus: Corpus, progress: bool) -> Iterator[str]:
    """Yield the text of each document to train a tokenizer on.

    Skipped documents are reported later, when the store is written. Raises DataError when every
    document was skipped.
    """
    read = 0
    skipped = 0
    first_message = ""
    with _progress_bar("tokenizer", corpus.file_bytes, progress) as bar:
        for piece in corpus.pieces():
            messages: list[str] = []
            for text in corpus.reading.texts((piece,), messages):
                read += 1
                yield text
            skipped += len(messages)
            if messages and not first_message:
                first_message = messages[0]
            bar.update(piece.stop - piece.start)
    if skipped and not read:
        raise DataError(f"{_all_skipped(skipped, corpus)} The first is {first_message}")


def _all_skipped(skipped: int, corpus: Corpus) -> str:
    return (
        f"no document has text: {skipped:,} were skipped. Set --json-key (now "
        f"{corpus.reading.json_key!r}) to the key of the text, or set --input."
    )


def _progress_bar(purpose: str, file_bytes: int, progress: bool) -> tqdm:
    """Create a progress bar over the bytes of the input files, with rate and remaining time."""
    return tqdm(total=file_bytes, desc=purpose, unit="B", unit_scale=True, disable=not progress)
