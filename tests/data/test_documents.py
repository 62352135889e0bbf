"""The documents of a file: exact, whatever it is compressed with, and named by line where they cannot be read."""

import gzip
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_ring.data.documents import Piece, Reading
from megatron_ring.errors import DataError

zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def documents(file: Path, json_key: str = "text") -> list[str]:
    """Every document, as with --on-error stop."""
    found = list(Piece(file, 0, file.stat().st_size).documents(Reading(json_key)))
    for document in found:
        if isinstance(document, DataError):
            raise document
    return found


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd.compress}


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSED.items())
def test_a_compressed_file_is_what_it_holds(tmp_path, suffix, compress):
    (tmp_path / f"a.txt{suffix}").write_bytes(compress("grün\n".encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compress(b'{"text": "one"}\n') + compress(b'{"text": "two"}\n'))
    assert documents(tmp_path / f"a.txt{suffix}") == ["grün\n"]
    assert documents(tmp_path / f"b.jsonl{suffix}") == ["one", "two"]


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSED.items())
@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"rubbish" + content])
def test_a_damaged_compressed_file_is_refused(tmp_path, suffix, compress, damage):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(damage(compress(b'{"text": "one"}\n' * 1000)))
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix} is damaged: .*Fetch it again, or leave it out of --input"):
        documents(tmp_path / f"a.jsonl{suffix}")


def test_rows_of_parquet_are_documents(tmp_path):
    parquet.write_table(pyarrow.table({"id": [1, 2], "content": ["one\n", "zwölf"]}), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet", "content") == ["one\n", "zwölf"]
    with pytest.raises(DataError, match=r"a\.parquet has no column 'text'; found 'id', 'content'\. Set --json-key"):
        documents(tmp_path / "a.parquet")


def test_a_row_without_text_is_named(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["one", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet:2: the text under 'text' is null"):
        documents(tmp_path / "a.parquet")


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_damaged_parquet_is_refused(tmp_path, keep):
    parquet.write_table(pyarrow.table({"text": ["one"] * 100}), tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=r"a\.parquet is damaged: .*no parquet file"):
        documents(tmp_path / "a.parquet")


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow.parquet"), ("a.txt.zst", zstd.__name__)])
def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch, name, package):
    def absent(wanted: str) -> None:
        raise ImportError(wanted)

    monkeypatch.setattr("importlib.import_module", absent)
    (tmp_path / name).write_bytes(b"any")
    with pytest.raises(DataError, match=rf"{name} is read with {package}, which is not installed.*megatron_ring\[data"):
        documents(tmp_path / name)


def test_text_that_is_not_utf8_is_named_by_file_and_line(tmp_path):
    (tmp_path / "latin.txt").write_bytes("one\ntwo\ngrün\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt:3: byte 0xfc is not UTF-8"):
        documents(tmp_path / "latin.txt")


BAD_LINES = {
    "not json": (b"{'text': 1}", "not a line of JSON: .*Every line of JSON lines .* is one object"),
    "not an object": (b'["text"]', "no text under 'text'; found list. Set --json-key"),
    "another key": (b'{"content": "a", "id": 1}', "no text under 'text'; found 'content', 'id'. Set --json-key"),
    "null": (b'{"text": null, "id": 1}', "the text under 'text' is null. .*--on-error skip"),
    "not a string": (b'{"text": 5}', "no text under 'text'; found 'text'"),
    "not UTF-8": (b'{"text": "\xfc"}', "byte 0xfc is not UTF-8"),
    "half a surrogate pair": (b'{"text": "a\\ud800"}', "half a surrogate pair at character 1"),
    "nested too deep": (b'{"text":' + b"[" * 100_000, "JSON nested too deep to be read"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {message}"):
        documents(tmp_path / "a.jsonl")
