"""Documents of a file: read exactly with any compression, and bad ones named by file and line."""

import bz2
import gzip
import importlib
import io
import lzma
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_ring.data import compression
from megatron_ring.data.documents import Piece, Reading
from megatron_ring.errors import DataError

zstd = importlib.import_module(
    "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
)


def documents(file: Path, json_key: str = "text") -> list[str]:
    """Read every document, as with --on-error stop."""
    results = list(Piece(file, 0, file.stat().st_size).documents(Reading(json_key)))
    for result in results:
        if isinstance(result, DataError):
            raise result
    return results


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstd.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": partial(lzma.compress, format=lzma.FORMAT_ALONE),
}


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSED.items())
@pytest.mark.parametrize("change_case", [str.lower, str.upper])
def test_a_compressed_file_is_read_as_its_content(tmp_path, suffix, compress, change_case):
    suffix = change_case(suffix)
    (tmp_path / f"a.txt{suffix}").write_bytes(compress("grün\n".encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(
        compress(b'{"text": "one"}\n') + compress(b'{"text": "two"}\n')
    )
    assert documents(tmp_path / f"a.txt{suffix}") == ["grün\n"]
    assert documents(tmp_path / f"b.jsonl{suffix}") == ["one", "two"]


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSED.items())
@pytest.mark.parametrize(
    "damage", [lambda content: content[:-9], lambda content: b"rubbish" + content]
)
def test_a_damaged_compressed_file_is_refused(tmp_path, suffix, compress, damage):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(damage(compress(b'{"text": "one"}\n' * 1000)))
    with pytest.raises(
        DataError,
        match=rf"a\.jsonl\{suffix} is damaged: .*--input",
    ):
        documents(tmp_path / f"a.jsonl{suffix}")


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_compression_is_recognized_by_content_where_the_name_has_no_suffix(tmp_path, suffix):
    (tmp_path / "a.jsonl").write_bytes(COMPRESSED[suffix](b'{"text": "one"}\n'))
    assert documents(tmp_path / "a.jsonl") == ["one"]


@pytest.mark.parametrize("suffix", [".zst", ".bz2", ".xz"])
def test_data_after_a_compressed_stream_is_read_or_refused_and_never_ignored(tmp_path, suffix):
    whole = COMPRESSED[suffix](b'{"text": "one"}\n')
    (tmp_path / f"a.jsonl{suffix}").write_bytes(whole + bytes(512) + whole + bytes(4))
    assert documents(tmp_path / f"a.jsonl{suffix}") == ["one", "one"]
    (tmp_path / f"b.jsonl{suffix}").write_bytes(whole + b"x" + whole)
    with pytest.raises(DataError, match=rf"b\.jsonl\{suffix} is damaged"):
        documents(tmp_path / f"b.jsonl{suffix}")


def test_a_zstd_frame_with_the_longest_window_is_read(tmp_path):
    parameter = zstd.CompressionParameter
    options = {parameter.window_log: 31, parameter.enable_long_distance_matching: 1}
    compressor = zstd.ZstdCompressor(options=options)
    skippable = bytes.fromhex("502a4d18 02000000 0000")
    content = compressor.compress(b'{"text": "one"}\n') + compressor.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + content)
    assert documents(tmp_path / "a.jsonl.zst") == ["one"]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(suffix, COMPRESSED[suffix]) for suffix in (".gz", ".zst", ".bz2", ".xz")],
)
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, suffix, compress):
    monkeypatch.setattr(compression, "ALWAYS_ALLOWED_BYTES", 1 << 16)
    monkeypatch.setattr(compression, "LARGEST_RATIO", 10)
    for number, content in enumerate((b"x" * (1 << 20), b'{"text": "one"}\n' * (1 << 16))):
        (tmp_path / f"{number}.jsonl{suffix}").write_bytes(compress(content))
        with pytest.raises(
            DataError, match=rf"{number}\.jsonl\{suffix} expands to more than 65,536 bytes"
        ):
            documents(tmp_path / f"{number}.jsonl{suffix}")


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_too_long_document_takes_little_memory_and_the_next_is_read(tmp_path, suffix, name):
    content = b"x" * (12 << 20) + b'\n{"text": "two"}\n'
    file = tmp_path / f"{name}{suffix}"
    file.write_bytes(COMPRESSED[suffix](content) if suffix else content)
    tracemalloc.start()
    reading = Reading(max_document_bytes=1 << 16)
    results = list(Piece(file, 0, file.stat().st_size).documents(reading))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(results[0], DataError)
    assert "--max-document-bytes" in str(results[0])
    assert "65,536" in str(results[0])
    assert results[1:] == (["two"] if name == "a.jsonl" else [])
    assert peak < 6 << 20


def test_the_length_limit_excludes_the_line_end(tmp_path):
    line = b'{"text": "one"}\n'
    (tmp_path / "a.jsonl").write_bytes(2 * line)
    (tmp_path / "b.txt").write_bytes(b"one")
    piece = Piece(tmp_path / "a.jsonl", 0, 2 * len(line))
    assert list(piece.documents(Reading(max_document_bytes=len(line) - 1))) == ["one", "one"]
    errors = list(piece.documents(Reading(max_document_bytes=len(line) - 2)))
    assert [str(error).split(": ")[0][-9:] for error in errors] == ["a.jsonl:1", "a.jsonl:2"]
    text = Piece(tmp_path / "b.txt", 0, 3)
    assert list(text.documents(Reading(max_document_bytes=3))) == ["one"]
    (error,) = text.documents(Reading(max_document_bytes=2))
    assert isinstance(error, DataError)


def test_each_parquet_cell_that_is_not_text_is_named(tmp_path):
    table = pyarrow.table({"text": pyarrow.array(["one", None, "x" * 9, "", "two"]), "n": range(5)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    piece = Piece(tmp_path / "a.parquet", 0, 1)
    results = list(piece.documents(Reading(max_document_bytes=8)))
    assert [results[0], *results[3:]] == ["one", "", "two"]
    assert "a.parquet:2: the text under 'text' is null" in str(results[1])
    assert "a.parquet:3: a cell of more than 8 bytes" in str(results[2])
    assert "a.parquet:1: no text under 'n'; found int64" in str(next(piece.documents(Reading("n"))))


def test_a_parquet_file_with_one_long_value_in_many_rows_is_refused_as_a_bomb(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(compression, "ALWAYS_ALLOWED_BYTES", 1 << 16)
    rows = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 20_000, pyarrow.int32()), ["x" * 10_000]
    )
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet expands to more than"):
        documents(tmp_path / "a.parquet")


def test_a_parquet_file_is_recognized_by_its_content(tmp_path):
    written = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["one"]}), written)
    (tmp_path / "a").write_bytes(written.getvalue())
    assert documents(tmp_path / "a") == ["one"]
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(written.getvalue()))
    with pytest.raises(DataError, match=r"a\.parquet\.gz is compressed twice"):
        documents(tmp_path / "a.parquet.gz")


def test_rows_of_parquet_are_documents(tmp_path):
    parquet.write_table(
        pyarrow.table({"id": [1, 2], "content": ["one\n", "zwölf"]}), tmp_path / "a.parquet"
    )
    assert documents(tmp_path / "a.parquet", "content") == ["one\n", "zwölf"]
    with pytest.raises(
        DataError, match=r"a\.parquet has no column 'text'; found 'id', 'content'\. Set --json-key"
    ):
        documents(tmp_path / "a.parquet")


def test_a_parquet_row_without_text_is_named(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["one", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet:2: the text under 'text' is null"):
        documents(tmp_path / "a.parquet")


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_damaged_parquet_is_refused(tmp_path, keep):
    parquet.write_table(pyarrow.table({"text": ["one"] * 100}), tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=r"a\.parquet is damaged: .*not a parquet file"):
        documents(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow.parquet"), ("a.txt.zst", zstd.__name__)]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    def raise_import_error(package: str) -> None:
        raise ImportError(package)

    monkeypatch.setattr("importlib.import_module", raise_import_error)
    (tmp_path / name).write_bytes(b"any")
    with pytest.raises(
        DataError,
        match=rf"{name} is read with {package}, which is not installed.*megatron_ring\[data",
    ):
        documents(tmp_path / name)


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
    (tmp_path / "latin.txt").write_bytes("one\ntwo\ngrün\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt:3: byte 0xfc is not UTF-8"):
        documents(tmp_path / "latin.txt")


BAD_LINES = {
    "not json": (b"{'text': 1}", "not a line of JSON: .* is one object"),
    "not an object": (b'["text"]', "no text under 'text'; found list. Set --json-key"),
    "another key": (
        b'{"content": "a", "id": 1}',
        "no text under 'text'; found 'content', 'id'. Set --json-key",
    ),
    "null": (b'{"text": null, "id": 1}', "the text under 'text' is null. .*--on-error skip"),
    "not a string": (b'{"text": 5}', "the value under 'text' is int, not text. Set --json-key"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16-le"), "byte 0x00, as in UTF-16"),
    "not UTF-8": (b'{"text": "\xfc"}', "byte 0xfc is not UTF-8"),
    "unpaired surrogate": (b'{"text": "a\\ud800"}', "an unpaired surrogate at character 1"),
    "nested too deep": (b'{"text":' + b"[" * 100_000, "JSON nested too deeply"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {message}"):
        documents(tmp_path / "a.jsonl")


@pytest.mark.parametrize(("encoding", "byte"), [("utf-16-le", "0xff"), ("utf-16-be", "0xfe")])
def test_the_byte_order_mark_of_utf16_is_named(tmp_path, encoding, byte):
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "a"}\n{"text": "b"}\n'.encode(encoding))
    with pytest.raises(
        DataError, match=rf"a\.jsonl:1: byte {byte} begins the byte order mark of UTF-16"
    ):
        documents(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_of_only_a_byte_order_mark_is_empty(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf")
    assert list(Reading().texts([Piece(tmp_path / name, 0, 3)], [])) == []


def test_a_byte_order_mark_before_a_record_is_ignored(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert documents(tmp_path / "a.jsonl") == ["a"]
