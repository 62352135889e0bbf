"""Untrusted metadata is read in bounded time and memory, or refused with a reason."""

import json
import os
from dataclasses import dataclass
from typing import Annotated

import pytest
from pydantic import ConfigDict, Field

from megatron_ring.untrusted import (
    UntrustedInputError,
    check_link,
    parse_json,
    parse_json_object,
    parse_yaml,
    path_inside,
    read_bytes,
    validate,
)


@dataclass(frozen=True)
class Record:
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    count: Annotated[int, Field(ge=0)]
    sizes: tuple[int, ...] = ()
    rate: float = 0.0


def test_a_regular_file_up_to_the_limit_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", limit=5) == b"12345"
    with pytest.raises(UntrustedInputError, match=r"5 bytes, .* 4$"):
        read_bytes(tmp_path / "file", limit=4)


def test_a_sparse_file_of_terabytes_is_refused_by_its_size(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UntrustedInputError, match=str(1 << 40)):
        read_bytes(tmp_path / "sparse")


def test_a_pipe_a_device_and_a_folder_are_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "device", tmp_path):
        with pytest.raises(UntrustedInputError, match="regular"):
            read_bytes(path)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "missing")


def test_a_document_of_the_declared_types_is_read():
    content = b'{"count": 3, "sizes": [1, 2], "rate": 1}'
    assert parse_json(content, Record) == Record(3, (1, 2), 1.0)


def test_a_parsed_value_is_validated_without_conversion():
    sizes = Annotated[dict[str, Annotated[int, Field(gt=0)]], Field(max_length=2)]
    assert validate({"a": 3}, sizes) == {"a": 3}
    for other in ({"a": 0}, {"a": "3"}, {1: 3}, [3], {"a": 1, "b": 2, "c": 3}):
        with pytest.raises(UntrustedInputError):
            validate(other, sizes)


@pytest.mark.parametrize(
    ("content", "location"),
    [
        (b"hello", "JSON"),
        (b'{"count": "3"}', "count"),
        (b'{"count": -1}', "count"),
        (b'{"count": true}', "count"),
        (b'{"count": 3.0}', "count"),
        (b'{"count": 3, "rate": NaN}', "rate"),
        (b'{"count": 3, "sizes": [1, null]}', "sizes.1"),
        (b'{"count": 3, "other": 1}', "other"),
        (b'{"sizes": []}', "count"),
        (b"[]", "object"),
        (b'{"count": ' + b"[" * 100_000, "recursion"),
        (b'{"count": ' + b"9" * 10_000 + b"}", "count"),
        (b"\xff", "JSON"),
    ],
)
def test_an_invalid_document_is_refused_with_the_location_in_bounded_length(content, location):
    with pytest.raises(UntrustedInputError, match=location) as caught:
        parse_json(content, Record)
    assert len(str(caught.value)) < 1000


def test_an_object_of_any_keys_may_have_infinity_and_other_json_is_refused():
    assert parse_json_object(b'{"a": Infinity, "b": [null]}') == {"a": float("inf"), "b": [None]}
    for content in (b"[1]", b"1", b"{", b'{"a":' * 5000, b""):
        with pytest.raises(UntrustedInputError):
            parse_json_object(content)


def test_yaml_of_plain_values_is_read_with_a_byte_order_mark_and_aliases():
    text = "\ufeffa: &x [1, 2.5, ü]\r\nb: *x\r\n"
    assert parse_yaml(text.encode()) == {"a": [1, 2.5, "ü"], "b": [1, 2.5, "ü"]}
    assert parse_yaml(b"") is None


def test_a_key_may_replace_a_merged_one_and_occur_in_several_mappings():
    text = b"x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: {a: {a: 4}}"
    assert parse_yaml(text) == {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}, "z": {"a": {"a": 4}}}


def _alias_bomb() -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 9):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join(lines).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: [1", "not YAML"),
        (b"lr: 2001-99-99", "cannot be read"),
        (b"a: " + b"[" * 20_000 + b"]" * 20_000, "deep"),
        (b"a: " + b"[" * 60 + b"]" * 60, "deep"),
        pytest.param(_alias_bomb(), "100000", id="bomb"),
        (b"a: &x [*x]", "itself"),
        (b"n: " + b"9" * 5000, "5000 characters"),
        (b"n: 1" + b":10" * 300_000, "900001 characters"),
        (b"n: 1" + b":1" * 180 + b".5", "cannot be read"),
        (b'n: !!int ""', "cannot be read"),
        (b"n: !!bool x", "cannot be read"),
        (b"n: !!timestamp x", "cannot be read"),
        (b"n: 0x" + b"f" * 80, "320 bits"),
        (b"n: [{m: -9223372036854775808}]", "64 bits"),
        (b"f: !!python/object/apply:os.getcwd []", "not YAML"),
        (b"a: \xff", "cannot be read"),
        (b"a: 1\n---\nb: 2", "not YAML"),
        (b"t: {lr: 1}\nm: 2\nt: {iters: 3}", "'t' is twice in one mapping, in lines 1 and 3"),
        (b'- x:\n    "a": 1\n    a: 2', "'a' is twice in one mapping, in lines 2 and 3"),
        (b"1: a\n0x1: b", "1 is twice in one mapping, in lines 1 and 2"),
    ],
)
def test_invalid_or_malicious_yaml_is_refused(content, reason):
    with pytest.raises(UntrustedInputError, match=reason):
        parse_yaml(content)


def test_a_name_must_stay_inside_its_folder(tmp_path):
    assert path_inside(tmp_path, "a/b.json") == tmp_path / "a" / "b.json"
    for name in ("", ".", "..", "../a", "a/../../b", "/etc/passwd", "a\0b"):
        with pytest.raises(UntrustedInputError, match="inside the folder"):
            path_inside(tmp_path, name)


def test_a_link_may_lead_into_its_folder_or_the_blobs_of_a_hub_cache(tmp_path):
    folder = tmp_path / "folder"
    secret = tmp_path / "secret"
    folder.mkdir()
    secret.write_text("secret")
    (folder / "file").write_text("content")
    (folder / "inside").symlink_to("file")
    (folder / "outside").symlink_to(secret)
    check_link(folder, folder / "inside")
    with pytest.raises(UntrustedInputError, match="outside"):
        check_link(folder, folder / "outside")

    model = tmp_path / "models--owner--name"
    snapshot = model / "snapshots" / "0123"
    blobs = model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "stolen").symlink_to(secret)
    check_link(snapshot, snapshot / "config.json")
    with pytest.raises(UntrustedInputError, match="outside"):
        check_link(snapshot, snapshot / "stolen")


def test_error_messages_are_short_for_any_value():
    for value in ("x" * 10**6, 10**1000, [0] * 10**6):
        with pytest.raises(UntrustedInputError) as caught:
            parse_json(json.dumps({"count": 1, "rate": value}).encode(), Record)
        assert len(str(caught.value)) < 300
