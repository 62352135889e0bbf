"""File formats: recognized by name, by content where the name does not decide, or refused."""

import pytest

from megatron_ring.data.file_formats import (
    HEAD_BYTES,
    Kind,
    NotJsonLines,
    UnreadableFormat,
    kind_of,
    split_name,
    suffix_pattern,
)

LINES = b'{"text": "one"}\n{"text": "two"}\n'
PRETTY = b'{\n  "text": "one"\n}\n'


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.jsonl", (".jsonl", "")),
        ("A.JSONL.GZ", (".jsonl", ".gz")),
        ("c4-train.00000-of-01024.json.gz", (".json", ".gz")),
        ("a.tgz", (".tar", ".gz")),
        ("a.TAR.XZ", (".tar", ".xz")),
        ("a.txz", (".tar", ".xz")),
        ("a.tar.zst", (".tar", ".zst")),
        ("a.gz", ("", ".gz")),
        ("folder.d/plain", ("", "")),
        (".gz", ("", "")),
    ],
)
def test_a_name_is_split_into_content_and_compression_suffix(name, parts):
    assert split_name(name) == parts


@pytest.mark.parametrize(
    ("head", "suffix", "kind"),
    [
        (LINES, ".jsonl", Kind.JSON_LINES),
        (PRETTY, ".jsonl", Kind.JSON_LINES),  # the name decides: each bad line is an error
        (LINES, ".json", Kind.JSON_LINES),
        (b"\xef\xbb\xbf\r\n  \r\n" + LINES, ".json", Kind.JSON_LINES),
        (b'{"id": 1}\n', ".json", Kind.JSON_LINES),
        (b"  \n", ".json", Kind.JSON_LINES),
        (b'{"text": "' + b"x" * HEAD_BYTES, ".json", Kind.JSON_LINES),
        (LINES, "", Kind.JSON_LINES),
        (LINES, ".txt", Kind.JSON_LINES),
        (b'{"text": null}\n', ".dat", Kind.JSON_LINES),
        (b'{"text": "' + b"x" * HEAD_BYTES, "", Kind.JSON_LINES),
        (b'{"body": "one"}\n', ".txt", Kind.TEXT),
        (b"{ " + b"x" * HEAD_BYTES, ".txt", Kind.TEXT),
        (b"[" * 60_000, ".txt", Kind.TEXT),
        (PRETTY, ".txt", Kind.TEXT),
        (LINES, ".md", Kind.TEXT),
        (LINES, ".text", Kind.TEXT),
        (b"one\n", "", Kind.TEXT),
        (b"", "", Kind.TEXT),
        (b"PK\x03\x04", "", Kind.ZIP),
        (b"PAR1", "", Kind.PARQUET),
        (b"a.txt" + bytes(252) + b"ustar\x00", "", Kind.TAR),
    ],
)
def test_the_name_decides_the_kind_or_else_the_content(head, suffix, kind):
    assert kind_of(head, suffix, "text") is kind


@pytest.mark.parametrize(
    "head", [PRETTY, b'[{"text": "one"}]', b"[\n", b"one", b"5\n", b"[" * (2 * HEAD_BYTES)]
)
def test_a_json_file_of_one_value_is_not_json_lines(head):
    with pytest.raises(NotJsonLines, match="jq -c"):
        kind_of(head[:HEAD_BYTES], ".json", "text")


@pytest.mark.parametrize(
    ("head", "suffix", "name"),
    [
        (b"7z\xbc\xaf\x27\x1c", "", "7z"),
        (b"Rar!\x1a\x07\x01\x00", "", "RAR"),
        (b"%PDF-1.7\n", ".txt", "PDF"),
        (b"\x93NUMPY\x01\x00", ".npy", "NumPy"),
        (b"\x04\x22\x4d\x18", ".jsonl", "lz4"),
        (b"PK\x03\x04", ".docx", "Word"),
        (b"PK\x03\x04", ".pt", "PyTorch"),
        (b"WARC/1.0\r\n", "", "WARC"),
        (b"any", ".br", "brotli"),
        (b"\x00\x05\x16\x07", ".jsonl", "AppleDouble"),
        (b"text\0", ".txt", "NUL"),
        ("one".encode("utf-16-le"), "", "UTF-16"),
    ],
)
def test_a_format_without_text_is_refused_and_named(head, suffix, name):
    with pytest.raises(UnreadableFormat, match=name):
        kind_of(head, suffix, "text")


def test_unusual_suffixes_share_one_pattern():
    assert suffix_pattern(".png") == "*.png"
    assert suffix_pattern("") == "files without a suffix"
    assert suffix_pattern(".x" * 20) == suffix_pattern(".\n") == "files with other suffixes"
