"""Streamed pieces add up to the whole text, and no incomplete character is printed."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokenizer_training import train_tokenizer
from megatron_ring.inference.text_stream import REPLACEMENT, TextStream
from tests.data.text import TEXT

SAMPLE = "  for größe in ('☃', '漢字', '🦙🦙'):\n\tyield größe"


def byte_level() -> Tokenizer:
    """A byte-level BPE without merges: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(tokenizer.to_str().encode(), "bytes")


def byte_fallback() -> Tokenizer:
    """A tokenizer.json of Llama's kind: spaces as U+2581, dropped at the start, bytes as <0x..>."""
    pieces = ["</s>", "▁", "▁for", "f", "o", "r", "i", "n", "g", "e", "▁in", "("]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token=None)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(tokenizer.to_str().encode(), "fallback")


TOKENIZERS = {
    "sentencepiece": lambda: train_tokenizer([TEXT], 320),
    "byte-level BPE": byte_level,
    "byte fallback": byte_fallback,
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["", "def a(b):", "für"])
def test_the_pieces_add_up_to_the_text_and_hold_complete_characters(name, prompt):
    tokenizer = TOKENIZERS[name]()
    before = tokenizer.encode(prompt)
    stream = TextStream(tokenizer.decode, before)
    pieces = [stream.add(token) for token in tokenizer.encode(SAMPLE)]
    assert stream.finish() == ""
    assert not any(REPLACEMENT in piece for piece in pieces)
    expected = SAMPLE
    if name == "byte fallback" and not prompt:
        expected = SAMPLE[1:]  # its decoder drops the first space of a text
    assert "".join(pieces) == expected
    assert sum(map(bool, pieces)) > 20  # it streams


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_that_are_not_text_are_returned_late_and_once(name):
    tokenizer = TOKENIZERS[name]()
    snowman = tokenizer.encode("x☃")[-3:]
    assert len(snowman) == 3
    stream = TextStream(tokenizer.decode)
    letters = tokenizer.encode("for")
    assert "".join(stream.add(token) for token in letters).strip() == "for"
    assert [stream.add(token) for token in snowman[:2]] == ["", ""]
    later = stream.add(letters[-1])
    assert later.startswith(REPLACEMENT)
    assert later.endswith("r")
    assert stream.add(snowman[0]) == ""
    assert stream.finish() == REPLACEMENT
    assert stream.finish() == ""


def test_a_token_without_text_adds_nothing():
    tokenizer = byte_level()
    stream = TextStream(tokenizer.decode)
    ids = [*tokenizer.encode("a"), tokenizer.end_of_document, *tokenizer.encode("ü")]
    assert [stream.add(token) for token in ids] == ["a", "", "", "ü"]
