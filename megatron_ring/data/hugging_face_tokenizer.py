"""A Hugging Face ``tokenizer.json`` as a vocabulary: byte-level BPE (GPT-2, tiktoken's kind), and Llama's kind.

Nothing is put around a text, and a special token spelled out in a text is read as the characters it is: else a page
about ``<|endoftext|>`` would end in its middle.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers

from megatron_ring.data.sentencepiece_tokenizer import SPACE
from megatron_ring.errors import DataError

# What published models end a text with, in the order they are looked for.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "[EOS]")

# What they begin one with.
BEGINS = (
    "<s>",
    "<|begin_of_text|>",
    "<bos>",
    "<｜begin▁of▁sentence｜>",
    "[BOS]",
    "<|startoftext|>",
)

LARGEST_ID = (1 << 22) - 1
"""The largest token id that is read: a model has a row of its embedding for each id up to it."""

_BYTE = re.compile("<0x[0-9A-F]{2}>")


class HuggingFaceTokens:
    """The tokens of ``model``, the content of a ``tokenizer.json``; ``name`` is for messages.

    Raises DataError when ``model`` is no such file.
    """

    def __init__(self, model: bytes, name: str | Path):
        self._name = name
        self._tokens = _loaded(model, name)
        with _library(name, "has a vocabulary that cannot be read"):
            self._ids = self._tokens.get_vocab()
            self._added = self._tokens.get_added_tokens_decoder()
            self._byte_level = any(
                part["type"] == "ByteLevel" for part in _decoders(json.loads(model))
            )
        # Ids may have holes.
        self.vocab_size: int = max(self._ids.values(), default=-1) + 1
        if self.vocab_size - 1 > LARGEST_ID:
            raise DataError(
                f"tokenizer {name} has id {self.vocab_size - 1} among its {len(self._ids)} tokens, and ids go up to "
                f"{LARGEST_ID} (2^22 - 1), since a model has a row for each. Set --tokenizer-model to another one, or "
                "number its tokens anew."
            )
        self._own_begin = self._post_processed_begin()
        if any(token >= self.vocab_size for token in self._own_begin):
            raise DataError(
                f"tokenizer {name} begins a text with ids {self._own_begin}, and its vocabulary has ids below "
                f"{self.vocab_size}. Mend its post_processor, or set --tokenizer-model to another one."
            )

    def default_end(self) -> int | None:
        """The id of the first of ``ENDS`` that the vocabulary has, None where it has none."""
        return next((self._ids[end] for end in ENDS if end in self._ids), None)

    def default_begin(self) -> int | None:
        """The id of the first of ``BEGINS`` that the vocabulary has, None where it has none."""
        return next((self._ids[begin] for begin in BEGINS if begin in self._ids), None)

    def own_begin(self) -> tuple[int, ...]:
        """The ids that the file's post-processor puts before a text, as transformers does; none
        where it has none."""
        return self._own_begin

    def _post_processed_begin(self) -> tuple[int, ...]:
        with _library(self._name, "cannot encode 'a'"):
            alone, framed = (
                self._tokens.encode("a", add_special_tokens=added).ids for added in (False, True)
            )
        starts = (
            n for n in range(len(framed) - len(alone) + 1) if framed[n : n + len(alone)] == alone
        )
        return tuple(framed[: next(starts, 0)])

    def id_of(self, token: str) -> int | None:
        """The id of ``token``, None where the vocabulary has no such token."""
        return self._ids.get(token)

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The ids of each text."""
        # One text at a time, since a batch would be spread over threads, and our processes have every core already.
        for text in texts:
            with _library(self._name, f"cannot encode a text that begins {text[:40]!r}"):
                ids = self._tokens.encode_batch_fast([text], add_special_tokens=False)[0].ids
            yield ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``; special tokens have none."""
        ids = [int(token) for token in tokens]
        with _library(self._name, "cannot decode ids of its own"):
            return self._tokens.decode(ids, skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for: (V,) int64; 0 for special tokens and for ids that
        are none."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for spelled, token in self._ids.items():
            counts[token] = self._bytes_of(token, spelled)
        return counts

    def _bytes_of(self, token: int, spelled: str) -> int:
        if token in self._added:
            return 0 if self._added[token].special else len(self._added[token].content.encode())
        # GPT-2's alphabet has a character for each byte; Llama's spells bytes as <0x0A>.
        if self._byte_level:
            return len(spelled)
        return 1 if _BYTE.fullmatch(spelled) else len(spelled.replace(SPACE, " ").encode())


def _loaded(model: bytes, name: str | Path) -> tokenizers.Tokenizer:
    with _library(name, f"({len(model)} bytes) is not a tokenizer.json"):
        loaded = tokenizers.Tokenizer.from_buffer(model)
        loaded.encode_special_tokens = True
        loaded.no_padding()
        loaded.no_truncation()
    return loaded


@contextmanager
def _library(name: str | Path, failed: str) -> Iterator[None]:
    """Errors of the tokenizers library as DataError; ``failed`` completes "tokenizer NAME".

    The library raises nothing narrower than Exception, and its PanicException, for a panic of its
    Rust code, is not even that.
    """
    try:
        yield
    except BaseException as error:
        panicked = type(error).__name__ == "PanicException"
        if isinstance(error, MemoryError) or not (panicked or isinstance(error, Exception)):
            raise
        raise DataError(
            f"tokenizer {name} {failed}: {str(error)[:500]}. Set --tokenizer-model."
        ) from error


def _decoders(description: dict) -> list[dict]:
    decoder = description.get("decoder") or {"type": "none"}
    return decoder.get("decoders", [decoder])
