"""Malicious tokenizers and links: one error in bounded memory, and no write outside the folder."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_ring.data import hugging_face_tokenizer
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokens import TokenStore, TokenStoreWriter
from megatron_ring.errors import DataError
from megatron_ring.untrusted import replace_file
from tests.limited import limited

CONFIG = "tokenizer_config.json"


@pytest.fixture
def saved(tokenizer, tmp_path) -> Path:
    """The path of a saved tokenizer."""
    tokenizer.save(tmp_path / tokenizer.file_name)
    return tmp_path / tokenizer.file_name


def error_message(path: Path) -> str:
    """Load the tokenizer in limited memory and return the message of its DataError."""
    with pytest.raises(DataError) as caught:
        limited(lambda: Tokenizer.load(path).vocab_size)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


@pytest.mark.parametrize("is_config", [False, True])
def test_a_pipe_or_a_sparse_file_is_not_read(is_config, saved):
    path = saved.with_name(CONFIG) if is_config else saved
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert f"{path} cannot be read: it is not a regular file" in error_message(saved)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert f"{1 << 40} bytes" in error_message(saved)


@pytest.mark.parametrize(
    "content",
    [
        b'{"eos_token": 5}',
        b'{"eos_token": ["</s>"]}',
        b'{"eos_token": {"content": 5}}',
        b'{"eos_token": {}}',
        b'{"eos_token":' * 5000,
        b"{",
        b'"</s>"',
        b"\xff",
    ],
)
def test_a_configuration_of_wrong_types_or_too_deep_is_refused(content, saved):
    saved.with_name(CONFIG).write_bytes(content)
    assert f"{CONFIG} cannot be read" in error_message(saved)


@pytest.mark.parametrize(
    "content", [b'{"eos_token": "</s>"}', b'{"eos_token": {"content": "</s>"}}', b"{}"]
)
def test_both_forms_of_an_eos_token_are_read(content, saved, tokenizer):
    saved.with_name(CONFIG).write_bytes(content)
    assert Tokenizer.load(saved).end_of_document == tokenizer.end_of_document


def test_a_model_with_a_piece_that_is_not_utf8_is_refused_when_it_is_loaded(tokenizer):
    assert tokenizer.model.count(b"</s>") == 1
    with pytest.raises(DataError, match="not a sentencepiece model"):
        Tokenizer(tokenizer.model.replace(b"</s>", b"</\xff>"), "x")


@pytest.mark.parametrize(
    "content", [b'{"a":' * 5000, b'{"model": {"type": ["BPE"]}}', b"{" + b" " * 10**6]
)
def test_a_tokenizer_json_of_wrong_types_or_too_deep_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert "is not a tokenizer.json" in error_message(tmp_path / "tokenizer.json")


def tokenizer_json(**parts) -> bytes:
    """A tokenizer.json of the tokens ``</s>`` and ``a``."""
    parts.setdefault("model", {"type": "BPE", "vocab": {"</s>": 0, "a": 1}, "merges": []})
    return json.dumps({"version": "1.0", "added_tokens": [], **parts}).encode()


def test_a_panic_of_the_tokenizers_library_is_a_data_error():
    panics = tokenizer_json(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(
        DataError, match="tokenizer x .* is not a tokenizer.json: .*--tokenizer-model"
    ):
        Tokenizer(panics, "x")


@pytest.mark.parametrize(
    "model",
    [
        {"type": "Unigram", "unk_id": None, "vocab": [["</s>", 0.0], ["a", -1.0]]},
        {"type": "WordLevel", "unk_token": "?", "vocab": {"</s>": 0, "a": 1}},
    ],
)
def test_a_text_that_the_tokenizers_library_cannot_encode_is_a_data_error(model):
    loaded = Tokenizer(tokenizer_json(model=model), "x")
    assert loaded.encode("a") == [1]
    with pytest.raises(
        DataError, match="tokenizer x cannot encode a text that begins 'word': .*--tokenizer-model"
    ):
        loaded.encode("word")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, MemoryError])
def test_errors_not_of_the_tokenizers_library_pass_through(stop):
    with pytest.raises(stop), hugging_face_tokenizer._library_errors("x", "cannot"):
        raise stop


@pytest.mark.parametrize("begin", [2, 1 << 31])
def test_a_post_processor_with_an_id_outside_the_vocabulary_is_refused_when_it_is_loaded(begin):
    frame = {"type": "BertProcessing", "sep": ["</s>", 0], "cls": ["<s>", begin]}
    with pytest.raises(DataError, match=rf"ids \({begin},\), and its vocabulary has ids below 2"):
        Tokenizer(tokenizer_json(post_processor=frame), "x")


def test_links_under_temporary_names_are_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for name in ("manifest.json.tmp", "manifest.json", "P.bin.tmp", "P.idx.tmp", "P.bin"):
        (tmp_path / name).symlink_to(secret)
    replace_file(tmp_path / "manifest.json", b"{}")
    with TokenStoreWriter(tmp_path / "P", np.dtype("<u2")) as writer:
        writer.add_document([1, 2, 3])
    assert secret.read_text() == "secret"
    assert json.loads((tmp_path / "manifest.json").read_text()) == {}
    assert TokenStore(tmp_path / "P").document(0).tolist() == [1, 2, 3]
