"""state.json has its own checksum: any changed byte or invalid value is refused."""

import json
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.checkpoint.state import FileRecord, decode, encode
from megatron_ring.errors import CheckpointError
from tests.checkpoint.small import state

FILES = {"rank-0.pt": FileRecord(3, "a" * 64), "zero/rank-1.pt": FileRecord(0, "b" * 64)}
CONTENT = encode(state(5), FILES)
DAMAGED = "its state.json is damaged or of another version"


def test_an_encoded_state_is_json_and_is_decoded_back():
    assert decode(CONTENT) == (state(5), FILES)
    assert json.loads(CONTENT)["files"]["rank-0.pt"] == {"bytes": 3, "sha256": "a" * 64}


@given(st.integers(0, 8 * len(CONTENT) - 1))
def test_a_flipped_bit_is_refused(bit):
    flipped = bytearray(CONTENT)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CheckpointError, match=DAMAGED):
        decode(bytes(flipped))


@given(st.binary() | st.integers(0, len(CONTENT) - 1).map(lambda size: CONTENT[:size]))
def test_other_bytes_are_refused(content):
    with pytest.raises(CheckpointError, match=DAMAGED):
        decode(content)


def test_fields_of_another_version_are_refused():
    other = encode(state(5), FILES).replace(b"vocab_size", b"vocab_rows")
    body = other[: other.rindex(b',\n  "sha256"')]
    with_checksum = body + b',\n  "sha256": "%s"\n}\n' % sha256(body).hexdigest().encode()
    with pytest.raises(CheckpointError, match=DAMAGED):
        decode(with_checksum)


def encoded(**changes) -> bytes:
    """Return state.json with changed values and a valid checksum."""
    document = json.loads(CONTENT) | changes
    del document["sha256"]
    body = json.dumps(document, indent=2).removesuffix("\n}").encode()
    return body + b',\n  "sha256": "%s"\n}\n' % sha256(body).hexdigest().encode()


def test_valid_values_with_a_valid_checksum_are_read():
    assert decode(encoded()) == (state(5), FILES)
    loss_scale = {"cur_scale": 65536.0, "cur_iter": 7, "last_overflow_iter": -1}
    read, _ = decode(encoded(loss_scale=loss_scale, recent_losses=[2, 1.5]))
    assert (read.loss_scale, read.recent_losses) == (loss_scale, [2.0, 1.5])
    assert type(read.loss_scale["cur_iter"]) is int


RECORD = {"bytes": 1, "sha256": "a" * 64}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("step", value) for value in ("nine", -7, 10**30, float("nan"), None, True, [1])),
        *(("consumed_samples", value) for value in (-3, 2**63, 1.5)),
        *(("vocab_size", value) for value in ("x", 0, 2**31)),
        *(("seq_length", value) for value in ({"a": 1}, 0)),
        *(("loss_scale", value) for value in ([1], {"a": "x"}, {"a": float("inf")})),
        *(("recent_losses", value) for value in ("x", [float("nan")], [None])),
        *(("processes", value) for value in (None, 1)),
        *(("files", value) for value in ([1, 2], None, {"a": 1}, {"a": {"bytes": 1}})),
        *(
            ("files", {"a": RECORD | change})
            for change in ({"bytes": "x"}, {"bytes": -1}, {"sha256": 1}, {"more": 1})
        ),
        *(
            ("files", {name: RECORD})
            for name in ("../x", "/etc/passwd", "a/../../x", "a\0b", "", ".")
        ),
        ("other", 1),
    ],
)
def test_an_invalid_value_with_a_valid_checksum_is_refused(key, value):
    with pytest.raises(CheckpointError, match=DAMAGED) as refused:
        decode(encoded(**{key: value}))
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "body", [b"hello", b'{"a":' * 5000, b'{"step":' + b"9" * 5000, b"[]", b"{"]
)
def test_other_content_with_a_valid_checksum_is_refused(body):
    with pytest.raises(CheckpointError, match=DAMAGED):
        decode(body + b',\n  "sha256": "%s"\n}\n' % sha256(body).hexdigest().encode())


def test_a_state_with_invalid_values_is_not_encoded():
    with pytest.raises(CheckpointError, match="consumed_samples"):
        encode(replace(state(5), consumed_samples=-1), FILES)
