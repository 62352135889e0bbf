"""A Hugging Face ``tokenizer.json`` as a vocabulary: byte-level BPE (GPT-2, tiktoken's kind), and Llama's kind.

Nothing is put around a text, and a special token spelled out in a text is read as the characters it is: else a page
about ``<|endoftext|>`` would end in its middle.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from megatron_ring.data.sentencepieces import SPACE
from megatron_ring.errors import DataError

# What published models end a text with, in the order they are looked for.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "[EOS]")

_BYTE = re.compile("<0x[0-9A-F]{2}>")


class HuggingFaceTokens:
    """The tokens of ``model``, the content of a ``tokenizer.json``; ``name`` is for messages.

    Raises DataError when ``model`` is no such file.
    """

    def __init__(self, model: bytes, name: str | Path):
        self._tokens = _loaded(model, name)
        self._ids = self._tokens.get_vocab()
        self._added = self._tokens.get_added_tokens_decoder()
        self._byte_level = any(part["type"] == "ByteLevel" for part in _decoders(json.loads(model)))
        # Ids may have holes.
        self.vocab_size: int = max(self._ids.values(), default=-1) + 1

    def default_end(self) -> int | None:
        """The id of the first of ``ENDS`` that the vocabulary has, None where it has none."""
        return next((self._ids[end] for end in ENDS if end in self._ids), None)

    def id_of(self, token: str) -> int | None:
        """The id of ``token``, None where the vocabulary has no such token."""
        return self._ids.get(token)

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The ids of each text."""
        # One text at a time, since a batch would be spread over threads, and our processes have every core already.
        for text in texts:
            yield self._tokens.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``; special tokens have none."""
        return self._tokens.decode([int(token) for token in tokens], skip_special_tokens=True)

    def token_bytes(self, token: int) -> int:
        """UTF-8 bytes that ``token`` stands for; 0 for special tokens and for ids that are none."""
        if token in self._added:
            return 0 if self._added[token].special else len(self._added[token].content.encode())
        spelled = self._spellings.get(token, "")
        # GPT-2's alphabet has a character for each byte; Llama's spells bytes as <0x0A>.
        if self._byte_level:
            return len(spelled)
        return 1 if _BYTE.fullmatch(spelled) else len(spelled.replace(SPACE, " ").encode())

    @cached_property
    def _spellings(self) -> dict[int, str]:
        return {token: spelled for spelled, token in self._ids.items()}


def _loaded(model: bytes, name: str | Path) -> tokenizers.Tokenizer:
    try:
        loaded = tokenizers.Tokenizer.from_buffer(model)
    # The library raises nothing narrower for a file that it cannot read.
    except Exception as error:
        raise DataError(
            f"tokenizer {name} ({len(model)} bytes) is not a tokenizer.json: {error}. Set --tokenizer-model."
        ) from error
    loaded.encode_special_tokens = True
    loaded.no_padding()
    loaded.no_truncation()
    return loaded


def _decoders(description: dict) -> list[dict]:
    decoder = description.get("decoder") or {"type": "none"}
    return decoder.get("decoders", [decoder])
