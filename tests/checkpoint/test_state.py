"""state.json guards itself: no other bytes are taken for it."""

import json
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


def test_what_is_written_is_read_and_is_json():
    assert decode(CONTENT) == (state(5), FILES)
    assert json.loads(CONTENT)["files"]["rank-0.pt"] == {"bytes": 3, "sha256": "a" * 64}


@given(st.integers(0, 8 * len(CONTENT) - 1))
def test_every_bit_counts(bit):
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
    resealed = body + b',\n  "sha256": "%s"\n}\n' % sha256(body).hexdigest().encode()
    with pytest.raises(CheckpointError, match=DAMAGED):
        decode(resealed)
