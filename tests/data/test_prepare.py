"""Preparing a store: the content of its files, and recovery after interruptions."""

import json
from multiprocessing import get_context
from pathlib import Path
from zipfile import ZipFile

import pytest

from megatron_ring.data import corpus as corpus_module
from megatron_ring.data import prepare as module
from megatron_ring.data import shards
from megatron_ring.data.corpus import gather
from megatron_ring.data.documents import Reading
from megatron_ring.data.manifest import Manifest, read_manifest
from megatron_ring.data.prepare import fit_tokenizer, prepare, prepare_python_library, work_folder
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokenizer_training import train_tokenizer
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import DataError
from tests.data.text import TEXT


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "text" / f"{name}.txt").write_text(f"{name}\n{TEXT}")
    return gather([tmp_path / "text"])


def test_a_store_has_the_documents_each_with_its_end_token(corpus, tokenizer, tmp_path):
    prepare(corpus, tmp_path / "store" / "P", tokenizer)
    store = TokenStore(tmp_path / "store" / "P")
    documents = [store.document(i) for i in range(len(store))]
    assert [tokenizer.decode(document) for document in documents] == [
        f"{name}\n{TEXT}" for name in "abc"
    ]
    assert {int(document[-1]) for document in documents} == {tokenizer.end_of_document}


def test_the_manifest_counts_documents_tokens_and_bytes(corpus, tokenizer, tmp_path):
    manifest = prepare(corpus, tmp_path / "store" / "P", tokenizer).manifest
    tokens = int(TokenStore(tmp_path / "store" / "P").lengths.sum())
    counts = {"documents": 3, "tokens": tokens, "bytes": corpus.file_bytes, "skipped": 0}
    assert manifest == Manifest(
        tokenizer.fingerprint, 320, **counts, end_of_document=tokenizer.end_of_document
    )
    assert read_manifest(tmp_path / "store" / "P") == manifest


def test_the_folder_has_store_manifest_and_tokenizer_and_nothing_else(corpus, tokenizer, tmp_path):
    prepare(corpus, tmp_path / "store" / "P", tokenizer)
    names = sorted(path.name for path in (tmp_path / "store").iterdir())
    assert names == ["P.bin", "P.idx", "P.json", "tokenizer.model"]
    saved = Tokenizer.load(tmp_path / "store" / "tokenizer.model")
    assert saved.fingerprint == tokenizer.fingerprint


def content(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")}


@pytest.fixture
def many_shards(monkeypatch):
    """Each file and every few lines of a .jsonl are a shard, and workers start for any work."""
    monkeypatch.setattr(corpus_module, "SHARD_BYTES", 100)
    monkeypatch.setattr(module, "_BYTES_PER_PROCESS", 1)


def test_shard_and_batch_sizes_do_not_affect_the_files(corpus, tokenizer, tmp_path, monkeypatch):
    prepare(corpus, tmp_path / "one" / "P", tokenizer)
    monkeypatch.setattr(corpus_module, "SHARD_BYTES", 100)
    monkeypatch.setattr(shards, "_BATCH_CHARACTERS", 1)
    prepare(corpus, tmp_path / "two" / "P", tokenizer)
    assert content(tmp_path / "one" / "P") == content(tmp_path / "two" / "P")


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The names of the files whose shards are made in this process, in order."""
    files: list[str] = []

    def recording_make_shard(job, tokenizer):
        files.extend(piece.file.name for piece in job.shard)
        return shards.make_shard(job, tokenizer)

    monkeypatch.setattr(module, "make_shard", recording_make_shard)
    return files


@pytest.mark.usefixtures("many_shards")
def test_the_number_of_processes_does_not_affect_the_files(tokenizer, tmp_path, made):
    lines = [json.dumps({"text": f"{number} {TEXT[number:]}"}) for number in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:20], "rubbish", *lines[20:]]))
    corpus = gather([tmp_path / "a.jsonl"], reading=Reading(on_error="skip"))
    one = prepare(corpus, tmp_path / "1" / "P", tokenizer)
    made.clear()
    assert prepare(corpus, tmp_path / "2" / "P", tokenizer, workers=2) == one
    assert made == [], "made by two other processes"
    assert one.manifest.documents == 50
    assert [message.split(": ")[0] for message in one.skipped] == [f"{tmp_path}/a.jsonl:21"]
    assert content(tmp_path / "1" / "P") == content(tmp_path / "2" / "P")


@pytest.mark.usefixtures("many_shards")
def test_members_left_out_of_archives_are_counted_with_any_number_of_processes(tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.zip", "b.zip"):
        with ZipFile(tmp_path / "in" / name, "w") as archive:
            for number in range(20):
                archive.writestr(f"{number}.txt", f"{number} {TEXT}")
                archive.writestr(f"{number}.png", "picture")
    corpus = gather([tmp_path / "in"])
    one = prepare(corpus, tmp_path / "1" / "P", tokenizer, workers=1).manifest
    two = prepare(corpus, tmp_path / "2" / "P", tokenizer, workers=2).manifest
    assert one == two
    assert one.documents == 40
    assert one.left_out == {"*.png in archives": 40}
    assert content(tmp_path / "1" / "P") == content(tmp_path / "2" / "P")


@pytest.mark.usefixtures("many_shards")
def test_after_an_interruption_only_missing_shards_are_made(corpus, tokenizer, tmp_path, made):
    prepare(corpus, tmp_path / "whole" / "P", tokenizer)
    file = tmp_path / "text" / "c.txt"
    good = file.read_bytes()
    file.write_bytes(b"\xff")
    with pytest.raises(DataError):
        prepare(corpus, tmp_path / "P", tokenizer)
    file.write_bytes(good)
    made.clear()
    prepare(corpus, tmp_path / "P", tokenizer)
    assert made == ["c.txt"]
    assert content(tmp_path / "P") == content(tmp_path / "whole" / "P")
    assert not work_folder(tmp_path / "P").exists()


@pytest.mark.usefixtures("many_shards")
@pytest.mark.parametrize("change", ["text", "tokenizer", "reading", "lost", "truncated", "record"])
def test_a_shard_whose_input_changed_or_files_are_damaged_is_made_again(
    corpus, tokenizer, tmp_path, made, monkeypatch, change
):
    monkeypatch.setattr(module, "_join", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(corpus, tmp_path / "P", tokenizer)
    made.clear()
    if change == "text":
        (tmp_path / "text" / "b.txt").write_text(TEXT)
    if change == "tokenizer":
        (tmp_path / "tokenizer.model").unlink()
        tokenizer = train_tokenizer([TEXT], 300)
    if change == "reading":
        corpus = gather([tmp_path / "text"], reading=Reading("content"))
    if change == "lost":
        min(work_folder(tmp_path / "P").glob("*.bin")).unlink()
    if change == "truncated":
        min(work_folder(tmp_path / "P").glob("*.bin")).write_bytes(b"")
    if change == "record":
        min(work_folder(tmp_path / "P").glob("*.json")).write_bytes(b"")
    with pytest.raises(ZeroDivisionError):
        prepare(corpus, tmp_path / "P", tokenizer)
    assert len(made) == {"tokenizer": 3, "reading": 3}.get(change, 1)


@pytest.mark.usefixtures("many_shards")
def test_shards_with_skipped_documents_are_reused_only_with_on_error_skip(
    corpus, tokenizer, tmp_path, made, monkeypatch
):
    (tmp_path / "text" / "c.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"c\.txt:1"):
        prepare(corpus, tmp_path / "P", tokenizer)
    made.clear()
    monkeypatch.setattr(module, "_join", lambda *_: 1 / 0)
    skipping = gather([tmp_path / "text"], reading=Reading(on_error="skip"))
    with pytest.raises(ZeroDivisionError):
        prepare(skipping, tmp_path / "P", tokenizer)
    assert made == ["c.txt"]
    with pytest.raises(DataError, match=r"c\.txt:1"):
        prepare(corpus, tmp_path / "P", tokenizer)


@pytest.mark.usefixtures("many_shards")
def test_a_file_named_twice_is_made_once_and_joined_twice(tokenizer, tmp_path, made):
    (tmp_path / "a.txt").write_text(TEXT)
    corpus = gather([tmp_path / "a.txt", tmp_path / "a.txt"])
    assert prepare(corpus, tmp_path / "P", tokenizer).manifest.documents == 2
    assert made == ["a.txt"]


def test_a_failure_leaves_an_older_store_unchanged(corpus, tokenizer, tmp_path):
    manifest = prepare(corpus, tmp_path / "P", tokenizer).manifest
    (tmp_path / "text" / "c.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"c\.txt:1"):
        prepare(corpus, tmp_path / "P", tokenizer)
    assert read_manifest(tmp_path / "P") == manifest
    assert len(TokenStore(tmp_path / "P")) == 3


def test_a_corpus_of_empty_documents_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(
        DataError, match=r"nothing to write to .*P: every document is empty\. Set --input"
    ):
        prepare(gather([tmp_path / "a.txt"]), tmp_path / "P", tokenizer)


def test_a_tokenizer_is_trained_on_the_corpus(corpus):
    assert fit_tokenizer(corpus, 330).vocab_size == 330


@pytest.fixture
def small_library(corpus, monkeypatch):
    """Three short texts instead of Python's library, and a small vocabulary."""
    monkeypatch.setattr(module, "python_library", lambda: corpus)
    monkeypatch.setattr(module, "DEFAULT_VOCAB_SIZE", 320)


@pytest.mark.usefixtures("small_library")
def test_processes_that_start_together_prepare_the_library_once(tmp_path, monkeypatch):
    written = tmp_path / "written"

    def recording_prepare(*arguments):
        with written.open("a") as file:
            file.write("once ")
        return prepare(*arguments)

    monkeypatch.setattr(module, "prepare", recording_prepare)
    # Forked processes inherit the small library.
    processes = [
        get_context("fork").Process(target=prepare_python_library, args=(tmp_path / "data",))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert written.read_text() == "once "
    assert len(TokenStore(prepare_python_library(tmp_path / "data"))) == 3


@pytest.mark.usefixtures("small_library")
@pytest.mark.parametrize("lost", ["tokens.bin", "tokens.idx", "tokens.json", "tokenizer.model"])
def test_the_library_is_prepared_again_after_an_interruption(tmp_path, lost):
    folder = prepare_python_library(tmp_path).parent
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / lost).unlink()
    (folder / "tokens.bin.tmp").write_text("half")
    prepare_python_library(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


@pytest.mark.usefixtures("small_library")
def test_a_tokenizer_left_by_an_interruption_is_replaced(tmp_path):
    folder = tmp_path / "python-library"
    folder.mkdir()
    (folder / "tokenizer.model").write_text("of another Python")
    assert len(TokenStore(prepare_python_library(tmp_path))) == 3


@pytest.mark.usefixtures("small_library")
def test_the_library_does_not_conflict_with_the_tokenizer_of_another_store(
    corpus, tokenizer, tmp_path
):
    prepare(corpus, tmp_path / "P", tokenizer)
    assert len(TokenStore(prepare_python_library(tmp_path))) == 3
