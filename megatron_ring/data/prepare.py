"""From documents to a store that can be trained on: P.bin, P.idx, P.json, and its tokenizer in the same folder.

The corpus is cut in shards (corpus.py), which one process makes (shards.py) or several (sharing.py), and which are then
joined in order.
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
from megatron_ring.data.shards import ShardJob, ShardRecord, finished, jobs, make
from megatron_ring.data.token_index import idx_path
from megatron_ring.data.tokenizer import Tokenizer, beside
from megatron_ring.data.tokenizer_training import train_tokenizer
from megatron_ring.data.tokens import TokenStoreWriter, bin_path, token_dtype
from megatron_ring.data.worker_pool import made_by
from megatron_ring.errors import DataError

DEFAULT_VOCAB_SIZE = 4096

# A process takes a second to start: for less work than this it is not worth while.
_BYTES_FOR_A_PROCESS = 8 << 20


@dataclass(frozen=True)
class Prepared:
    """The manifest of the store that was written, and what was skipped: a message with file and line for each."""

    manifest: Manifest
    skipped: tuple[str, ...]


def fit_tokenizer(corpus: Corpus, vocab_size: int, progress: bool = False) -> Tokenizer:
    """A tokenizer of ``vocab_size`` ids for ``corpus``. Raises DataError as reading and training do."""
    return train_tokenizer(_texts(corpus, progress), vocab_size)


def prepare(
    corpus: Corpus,
    prefix: str | Path,
    tokenizer: Tokenizer,
    workers: int = 1,
    progress: bool = False,
    prepend_bos: Literal["auto", "on", "off"] = "auto",
) -> Prepared:
    """Write every document of ``corpus``, each ended by the end-of-document id, and return what was done.

    ``prepend_bos`` is what begins them: see Tokenizer.begin_of_document.

    The number of ``workers``, processes that tokenize, changes nothing in the files. Cut short at any moment, it
    leaves no store that could be taken for a whole one, and what is finished in ``work_folder(prefix)``; called again
    it goes on from there. Raises DataError for text that cannot be read and for another tokenizer in the folder.
    """
    tokenizer_file = beside(prefix, tokenizer.file_name)
    begin = tokenizer.begin_of_document(prepend_bos)
    tokenizer.save(tokenizer_file)
    work = jobs(corpus, tokenizer, tokenizer_file, work_folder(prefix), begin)
    records = _make(work, tokenizer, workers, progress)
    manifest = _manifest(records, corpus, tokenizer, begin)
    if not manifest.documents and manifest.skipped:
        raise DataError(f"nothing to write to {prefix}: {_all_skipped(manifest.skipped, corpus)}")
    if not manifest.documents:
        raise DataError(f"nothing to write to {prefix}: every document is empty. Set --input.")
    _join(work, prefix, token_dtype(tokenizer.vocab_size))
    write_manifest(prefix, manifest)
    shutil.rmtree(work_folder(prefix), ignore_errors=True)
    return Prepared(manifest, tuple(chain.from_iterable(record.skipped for record in records)))


def work_folder(prefix: str | Path) -> Path:
    """``P.work``: what is finished of a store that is being written."""
    return Path(f"{prefix}.work")


def prepare_python_library(folder: str | Path, workers: int = 1, progress: bool = False) -> Path:
    """The prefix of a store of Python's own library under ``folder``, which is written first if it is not there.

    Any number of processes may ask at once: one writes while the others wait on a lock, then all find it done. After
    an interruption the next one starts over. It has a folder of its own, since a folder has one tokenizer.
    """
    prefix = Path(folder) / "python-library" / "tokens"
    with _locked(prefix.parent):
        if not _is_prepared(prefix):
            # Left by an interruption, perhaps of another Python; nothing depends on it yet.
            tokenizer_path(prefix).unlink(missing_ok=True)
            corpus = python_library()
            prepare(
                corpus,
                prefix,
                fit_tokenizer(corpus, DEFAULT_VOCAB_SIZE, progress),
                workers,
                progress,
            )
    return prefix


def _is_prepared(prefix: Path) -> bool:
    parts = bin_path(prefix), idx_path(prefix), tokenizer_path(prefix)
    return read_manifest(prefix) is not None and all(path.exists() for path in parts)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in ``folder``; blocks until it is. The lock ends with its process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    # Without O_NOFOLLOW a link of this name would have another file opened for writing.
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(folder / ".lock", flags, 0o666), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(
    work: list[ShardJob], tokenizer: Tokenizer, workers: int, progress: bool
) -> list[ShardRecord]:
    """The record of each job in order, those that an earlier run finished taken as they are."""
    records = {job.prefix: record for job in work if (record := finished(job))}
    # A file named twice is one shard, joined twice.
    left = list({job.prefix: job for job in work if job.prefix not in records}.values())
    left_bytes = sum(job.file_bytes for job in left)
    processes = min(workers, left_bytes // _BYTES_FOR_A_PROCESS)
    alone = ((job, make(job, tokenizer)) for job in left)
    made = made_by(processes, left, token_dtype(tokenizer.vocab_size)) if processes > 1 else alone
    with _bar("tokens", left_bytes, progress) as bar:
        for job, record in made:
            records[job.prefix] = record
            bar.update(job.file_bytes)
    return [records[job.prefix] for job in work]


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


def _join(work: list[ShardJob], prefix: str | Path, dtype: np.dtype) -> None:
    with TokenStoreWriter(prefix, dtype) as writer:
        for job in work:
            writer.add_store(job.prefix)
        # The store that was here is about to be replaced, and its manifest must not be found beside the new one.
        manifest_path(prefix).unlink(missing_ok=True)


def _texts(corpus: Corpus, progress: bool) -> Iterator[str]:
    """The text of each document, for a tokenizer to learn from. What is skipped here is told when it is written.

    Raises DataError when every document was skipped.
    """
    read, skipped, first = 0, 0, ""
    with _bar("tokenizer", corpus.file_bytes, progress) as bar:
        for piece in corpus.pieces():
            messages: list[str] = []
            for text in corpus.reading.texts((piece,), messages):
                read += 1
                yield text
            skipped += len(messages)
            first = first or next(iter(messages), "")
            bar.update(piece.stop - piece.start)
    if skipped and not read:
        raise DataError(f"{_all_skipped(skipped, corpus)} The first is {first}")


def _all_skipped(skipped: int, corpus: Corpus) -> str:
    return (
        f"no document has text: {skipped:,} were skipped. Set --json-key (now {corpus.reading.json_key!r}) to the key "
        "of the text, or set --input."
    )


def _bar(purpose: str, file_bytes: int, progress: bool) -> tqdm:
    """A bar over the bytes of the files, with their rate and the time left."""
    return tqdm(total=file_bytes, desc=purpose, unit="B", unit_scale=True, disable=not progress)
