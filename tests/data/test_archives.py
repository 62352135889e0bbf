"""Tar and zip archives: members are read in turn, names are never paths, damage is refused."""

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from megatron_ring.data import archives, compression
from megatron_ring.data.documents import Piece, Reading
from megatron_ring.errors import DataError


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def tar_of(members: dict[str, bytes], **options) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", **options) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return written.getvalue()


def zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return written.getvalue()


def read(file: Path, content: bytes, **reading) -> tuple[list[str], Counter[str]]:
    """Write ``content`` to ``file``, and return its texts and the counts of what was left out."""
    file.write_bytes(content)
    left_out = Counter()
    pieces = [Piece(file, 0, len(content))]
    return list(Reading(**reading).texts(pieces, [], left_out)), left_out


MEMBERS = {
    "a.jsonl": lines("one", "two"),
    "folder/b.txt": b"three\n",
    "c.JSON.GZ": gzip.compress(lines("four")),
    "d.ndjson.xz": lzma.compress(lines("five")),
    "e.png": b"\x89PNG\r\n",
    "f.parquet": b"PAR1",
    "g.json": b"[1]",
    "inner.zip": zip_of({"a.txt": b"hidden"}),
    "README": b"",
}
TEXTS = ["one", "two", "three\n", "four", "five"]
LEFT_OUT = {
    "*.png in archives": 1,
    "*.parquet in archives": 1,
    "*.zip in archives": 1,
    "*.json that are not JSON lines": 1,
    "files without a suffix in archives": 1,
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tar", tar_of(MEMBERS)),
        ("a.tar.gz", gzip.compress(tar_of(MEMBERS))),
        ("a.tbz2", bz2.compress(tar_of(MEMBERS))),
        ("a.txz", lzma.compress(tar_of(MEMBERS))),
        ("a.zip", zip_of(MEMBERS)),
        ("b.zip", zip_of(MEMBERS, zipfile.ZIP_LZMA)),
        ("unnamed", gzip.compress(tar_of(MEMBERS))),
    ],
)
def test_texts_and_json_lines_are_read_and_the_rest_is_counted(tmp_path, name, content):
    assert read(tmp_path / name, content) == (TEXTS, LEFT_OUT)


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_long_and_non_ascii_names_are_read_in_every_tar_format(tmp_path, tar_format):
    name = "/".join(["grün" * 5] * (4 if tar_format == tarfile.USTAR_FORMAT else 20)) + "/a.jsonl"
    content = tar_of({name: lines("one"), "b.jsonl": lines("two")}, format=tar_format)
    assert read(tmp_path / "a.tar", content) == (["one", "two"], {})


def test_a_member_is_named_in_one_line_of_an_error(tmp_path):
    with pytest.raises(DataError, match=r"a\.tar:x\\ny\.jsonl:2: not a line of JSON"):
        read(tmp_path / "a.tar", tar_of({"x\ny.jsonl": lines("one") + b"rubbish\n"}))


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_member_names_are_never_used_as_paths(tmp_path, make):
    (tmp_path / "in").mkdir()
    names = ["../up.txt", "/absolute.txt", "..\\up.txt", "C:\\up.txt"]
    before = set(tmp_path.rglob("*"))
    texts, _ = read(tmp_path / "in" / "a", make({name: b"text" for name in names}))
    assert texts == ["text"] * 4
    assert set(tmp_path.rglob("*")) == before | {tmp_path / "in" / "a"}


def test_links_devices_and_sparse_files_of_a_tar_are_counted_not_read(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        kinds = (
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.CHRTYPE,
            tarfile.FIFOTYPE,
            tarfile.DIRTYPE,
        )
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"{number}.txt")
            info.type = kind
            info.linkname = str(tmp_path / "secret.txt")
            archive.addfile(info)
        info = tarfile.TarInfo("sparse.txt")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": str(1 << 60)}
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
        info = tarfile.TarInfo("last.txt")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"last"))
    texts, left_out = read(tmp_path / "a.tar", written.getvalue())
    assert texts == ["last"]
    assert left_out == {"links, devices and sparse files in archives": 5}


def test_links_of_a_zip_are_counted_not_read(tmp_path):
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        info = zipfile.ZipInfo("a.txt")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
        archive.mkdir("folder.txt")
    texts, left_out = read(tmp_path / "a.zip", written.getvalue())
    assert texts == []
    assert left_out == {"links, devices and sparse files in archives": 1}


def test_concatenated_archives_are_all_read(tmp_path):
    content = tar_of({"a.txt": b"one"}) + tar_of({"b.txt": b"two"})
    assert read(tmp_path / "a.tar", content)[0] == ["one", "two"]
    halves = gzip.compress(tar_of({"a.txt": b"one"})) + gzip.compress(tar_of({"b.txt": b"two"}))
    assert read(tmp_path / "a.tar.gz", halves)[0] == ["one", "two"]


WHOLE = tar_of({"a.txt": b"x" * 700, "b.txt": b"y"})


@pytest.mark.parametrize(
    "content",
    [
        WHOLE[:600],
        WHOLE[:1200],
        WHOLE[:1536],  # between two members: only the end marker is missing
        WHOLE[:1536] + b"rubbish" * 100,
        WHOLE[:1536] + WHOLE[1536:2048].replace(b"b.txt", b"c.txt") + WHOLE[2048:],
        b"rubbish" * 100,
    ],
)
def test_a_damaged_tar_is_refused(tmp_path, content):
    with pytest.raises(DataError, match=r"a\.tar is damaged: .*--input"):
        read(tmp_path / "a.tar", content)


@pytest.mark.parametrize("size", [b"-" + b"0" * 11, b"\xff" * 12, b"\x80" + b"\x7f" * 11])
def test_a_tar_with_an_impossible_size_is_refused(tmp_path, size):
    block = bytearray(WHOLE[:512])
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    with pytest.raises(DataError, match=r"a\.tar is damaged"):
        read(tmp_path / "a.tar", bytes(block) + WHOLE[512:])


@pytest.mark.parametrize("records", [b"0 path=a\n", b"99 path=a\n", b"path=a\n", b"1 \n"])
def test_a_tar_with_a_damaged_extended_header_is_refused(tmp_path, records):
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    info.size = len(records)
    content = info.tobuf() + records.ljust(512, b"\0") + WHOLE
    with pytest.raises(DataError, match=r"a\.tar is damaged: a member's extended header"):
        read(tmp_path / "a.tar", content)


def test_an_extended_header_of_gigabytes_is_not_read(tmp_path):
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    info.size = 1 << 30
    with pytest.raises(DataError, match=r"extended header of 1073741824 bytes, .* 1048576"):
        read(tmp_path / "a.tar", info.tobuf() + bytes(2048))


def test_a_damaged_zip_is_refused(tmp_path):
    content = zip_of(MEMBERS)
    for damage in (content[:-30], b"PK\x03\x04" + content[4:100]):
        with pytest.raises(DataError, match=r"a\.zip is damaged"):
            read(tmp_path / "a.zip", damage)
    stored = zip_of({"a.txt": b"three"}, zipfile.ZIP_STORED).replace(b"three", b"thr33")
    with pytest.raises(DataError, match=r"a\.zip is damaged: Bad CRC.*a\.txt"):
        read(tmp_path / "a.zip", stored)


def test_an_encrypted_zip_is_refused(tmp_path):
    content = bytearray(zip_of({"a.txt": b"one"}))
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        struct.pack_into("<H", content, content.index(header) + flags, 1)
    with pytest.raises(DataError, match=r"a\.zip cannot be read: .*encrypted"):
        read(tmp_path / "a.zip", bytes(content))


def test_an_archive_that_is_compressed_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.zip\.gz is compressed twice"):
        read(tmp_path / "a.zip.gz", gzip.compress(zip_of(MEMBERS)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tar.gz", gzip.compress(tar_of({"a.txt": bytes(1 << 20)}))),
        ("a.zip", zip_of({f"{n}.txt": b"x" * (1 << 18) for n in range(4)})),
        ("b.tar", tar_of({"a.txt.xz": lzma.compress(b"x" * (1 << 20))})),
    ],
)
def test_an_archive_that_is_a_decompression_bomb_is_refused(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(compression, "ALWAYS_ALLOWED_BYTES", 1 << 16)
    monkeypatch.setattr(compression, "LARGEST_RATIO", 10)
    with pytest.raises(
        DataError, match=r"expands to more than [\d,]+ bytes from [\d,]+, .*--input"
    ):
        read(tmp_path / name, content, on_error="skip")


def test_a_too_long_member_is_named_and_the_next_is_read(tmp_path):
    content = tar_of({"a.txt": b"x" * 3000, "b.txt": b"two"})
    with pytest.raises(DataError, match=r"a\.tar:a\.txt: .*--max-document-bytes"):
        read(tmp_path / "a.tar", content, max_document_bytes=2999)
    texts, _ = read(tmp_path / "a.tar", content, max_document_bytes=2999, on_error="skip")
    assert texts == ["two"]
    assert os.listdir(tmp_path) == ["a.tar"]


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def pax_header(*records: bytes) -> bytes:
    """A pax header of records that include their length."""
    content = b"".join(records)
    return header(tarfile.XHDTYPE, len(content)) + content + bytes(-len(content) % 512)


def test_only_the_used_keys_of_a_pax_header_are_kept():
    records = [b"14 k%06d=xy\n" % number for number in range(50_000)]
    size = len(lines("one"))
    member = header(tarfile.REGTYPE, 0) + lines("one") + bytes(-size % 512)
    used = (b"16 path=a.jsonl\n", b"%d size=%d\n" % (len(str(size)) + 9, size))
    kept = archives._pax_records(b"".join([*records, *used]), "a.tar")
    assert kept == {"path": b"a.jsonl", "size": str(size).encode()}
    content = io.BufferedReader(io.BytesIO(pax_header(*used) + member + bytes(1024)))
    members = archives.tar_members(content, "a.tar")
    read_members = [(member.name, member.content.read()) for member in members]
    assert read_members == [("a.jsonl", lines("one"))]


def test_padding_after_the_records_of_a_pax_header_is_stripped_once():
    """Stripping it for each record would take quadratic time."""
    calls = []

    class Records(bytes):
        def rstrip(self, *characters):
            calls.append(characters)
            return super().rstrip(*characters)

    archives._pax_records(Records(b"6 a=b\n" * 1000 + bytes(512)), "a.tar")
    assert len(calls) == 1


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_more_than_eight_extended_headers_in_a_row_are_refused(tmp_path, kind):
    one = header(kind, 6) + b"6 a=b\n" + bytes(506)
    member = tar_of({"a.txt": b"one"})
    assert read(tmp_path / "a.tar", one + member)
    with pytest.raises(DataError, match=r"a\.tar is damaged: .* more than 8 extended headers"):
        read(tmp_path / "a.tar", one * 600 + member)


@pytest.mark.parametrize("name", [b"\0aaaaa", b"\xff\xfe\xfd\xfc\xfb\xfa"])
def test_a_zip_with_an_unreadable_name_is_refused(tmp_path, name):
    # zipfile writes a non-ASCII name with the UTF-8 flag.
    content = zip_of({"üüü": b"one"}).replace("üüü".encode(), name)
    with pytest.raises(DataError, match=r"a\.zip is damaged"):
        read(tmp_path / "a.zip", content)


@pytest.mark.parametrize(("name", "archive"), [("a.tar", tar_of), ("a.zip", zip_of)])
def test_the_members_of_an_archive_share_one_expansion_limit(tmp_path, monkeypatch, name, archive):
    monkeypatch.setattr(compression, "ALWAYS_ALLOWED_BYTES", 1 << 16)
    monkeypatch.setattr(compression, "LARGEST_RATIO", 1)
    members = {f"{number}.txt.gz": gzip.compress(b"x" * 30_000) for number in range(3)}
    two_members = dict(list(members.items())[:2])
    assert len(read(tmp_path / name, archive(two_members))[0]) == 2
    with pytest.raises(DataError, match=rf"{name} expands to more than 65,536 bytes"):
        read(tmp_path / name, archive(members))
