"""From documents to a store that can be trained on: P.bin, P.idx, P.json, and tokenizer.model in the same folder."""

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from megatron_ring.data.documents import Corpus, python_library
from megatron_ring.data.manifest import Manifest, manifest_path, read_manifest, tokenizer_path, write_manifest
from megatron_ring.data.token_index import idx_path
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokenizer_training import train_tokenizer
from megatron_ring.data.tokens import TokenStoreWriter, bin_path, token_dtype
from megatron_ring.errors import DataError

DEFAULT_VOCAB_SIZE = 4096

_BATCH_CHARACTERS = 1_000_000


def fit_tokenizer(corpus: Corpus, vocab_size: int, progress: bool = False) -> Tokenizer:
    """A tokenizer of ``vocab_size`` ids for ``corpus``. Raises DataError as reading and training do."""
    return train_tokenizer(_texts(corpus, "tokenizer", progress), vocab_size)


def prepare(
    corpus: Corpus, prefix: str | Path, tokenizer: Tokenizer, workers: int = 1, progress: bool = False
) -> Manifest:
    """Write every document of ``corpus``, each ended by the end-of-document id, and return the counts.

    ``workers`` threads change nothing in the files. Cut short at any moment, it leaves no store that could be taken
    for a whole one. Raises DataError for text that cannot be read and for another tokenizer in the folder.
    """
    tokenizer.save(tokenizer_path(prefix))
    documents = tokens = text_bytes = 0
    with TokenStoreWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        for texts in _batches(_texts(corpus, "tokens", progress)):
            for text, ids in zip(texts, tokenizer.encode_documents(texts, workers)):
                writer.add_document(ids)
                documents, tokens, text_bytes = documents + 1, tokens + len(ids), text_bytes + len(text.encode())
        if not documents:
            raise DataError(f"nothing to write to {prefix}: every document is empty. Set --input.")
        # The store that was here is about to be replaced, and its manifest must not be found beside the new one.
        manifest_path(prefix).unlink(missing_ok=True)
    manifest = Manifest(tokenizer.fingerprint, tokenizer.vocab_size, documents, tokens, text_bytes)
    write_manifest(prefix, manifest)
    return manifest


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
            prepare(corpus, prefix, fit_tokenizer(corpus, DEFAULT_VOCAB_SIZE, progress), workers, progress)
    return prefix


def _is_prepared(prefix: Path) -> bool:
    parts = bin_path(prefix), idx_path(prefix), tokenizer_path(prefix)
    return read_manifest(prefix) is not None and all(path.exists() for path in parts)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in ``folder``; blocks until it is. The lock ends with its process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _texts(corpus: Corpus, purpose: str, progress: bool) -> Iterator[str]:
    """The text of each document, with a bar over the bytes of the files where ``progress`` is asked for."""
    with tqdm(total=corpus.file_bytes, desc=purpose, unit="B", unit_scale=True, disable=not progress) as bar:
        for document in corpus.documents():
            yield document.text
            bar.update(document.file_bytes)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about a million characters, enough to keep several threads busy."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
