"""The tokenizer backend for a Hugging Face ``tokenizer.json``: byte-level BPE, and Llama's kind.

Byte-level BPE is the kind of GPT-2 and tiktoken. Nothing is added around a text, and a special
token spelled out in a text is encoded as ordinary characters; otherwise a page about
``<|endoftext|>`` would be split in its middle.
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

# Tokens with which published models end a text, in the order they are looked up.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "[EOS]")

# Tokens with which published models begin a text, in the order they are looked up.
BEGINS = (
    "<s>",
    "<|begin_of_text|>",
    "<bos>",
    "<｜begin▁of▁sentence｜>",
    "[BOS]",
    "<|startoftext|>",
)

LARGEST_ID = (1 << 22) - 1
"""The largest supported token id: a model has a row of its embedding for each id up to it."""

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SHOWN_CHARACTERS = 40
_SHOWN_ERROR_CHARACTERS = 500


class HuggingFaceBackend:
    """Encodes and decodes with ``model``, the content of a ``tokenizer.json``.

    ``name`` is used in error messages. Raises DataError when ``model`` is not such a file.
    """

    def __init__(self, model: bytes, name: str | Path):
        self._name = name
        self._tokenizer = _load(model, name)
        with _library_errors(name, "has a vocabulary that cannot be read"):
            self._ids = self._tokenizer.get_vocab()
            self._added = self._tokenizer.get_added_tokens_decoder()
            decoders = _decoders(json.loads(model))
            self._is_byte_level = any(part["type"] == "ByteLevel" for part in decoders)
        # Ids may have gaps, so the vocabulary size is not the number of tokens.
        self.vocab_size: int = max(self._ids.values(), default=-1) + 1
        if self.vocab_size - 1 > LARGEST_ID:
            raise DataError(
                f"tokenizer {name} has id {self.vocab_size - 1} among its {len(self._ids)} tokens, "
                f"and the largest supported id is {LARGEST_ID} (2^22 - 1), because a model has an "
                "embedding row for each id. Set --tokenizer-model to another tokenizer, or "
                "renumber its tokens."
            )
        self._own_begin = self._post_processor_begin()
        if any(token >= self.vocab_size for token in self._own_begin):
            raise DataError(
                f"tokenizer {name} begins a text with ids {self._own_begin}, and its vocabulary "
                f"has ids below {self.vocab_size}. Fix its post_processor, or set "
                "--tokenizer-model to another tokenizer."
            )

    def default_end(self) -> int | None:
        """Return the id of the first of ``ENDS`` in the vocabulary, None if it has none."""
        return next((self._ids[end] for end in ENDS if end in self._ids), None)

    def default_begin(self) -> int | None:
        """Return the id of the first of ``BEGINS`` in the vocabulary, None if it has none."""
        return next((self._ids[begin] for begin in BEGINS if begin in self._ids), None)

    def own_begin(self) -> tuple[int, ...]:
        """Return the ids that the file's post-processor adds before a text, as transformers does.

        Empty if it adds none.
        """
        return self._own_begin

    def _post_processor_begin(self) -> tuple[int, ...]:
        """Find what precedes the ids of a sample text when special tokens are added."""
        with _library_errors(self._name, "cannot encode 'a'"):
            plain = self._tokenizer.encode("a", add_special_tokens=False).ids
            framed = self._tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(framed) - len(plain) + 1):
            if framed[start : start + len(plain)] == plain:
                return tuple(framed[:start])
        return ()

    def id_of(self, token: str) -> int | None:
        """Return the id of ``token``, None if it is not in the vocabulary."""
        return self._ids.get(token)

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yield the ids of each text."""
        # One text at a time: the library would spread a batch over threads, and our worker
        # processes already use every core.
        for text in texts:
            shown = repr(text[:_SHOWN_CHARACTERS])
            with _library_errors(self._name, f"cannot encode a text that begins {shown}"):
                encodings = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
            yield encodings[0].ids

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ``tokens``; special tokens have none."""
        ids = [int(token) for token in tokens]
        with _library_errors(self._name, "cannot decode its own ids"):
            return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """Return the UTF-8 bytes that each id stands for: (V,) int64.

        0 for special tokens and for ids without a token.
        """
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for spelling, token in self._ids.items():
            counts[token] = self._bytes_of(token, spelling)
        return counts

    def _bytes_of(self, token: int, spelling: str) -> int:
        if token in self._added:
            added = self._added[token]
            return 0 if added.special else len(added.content.encode())
        # GPT-2's alphabet has one character per byte; Llama's spells single bytes as <0x0A>.
        if self._is_byte_level:
            return len(spelling)
        if _BYTE.fullmatch(spelling):
            return 1
        return len(spelling.replace(SPACE, " ").encode())


def _load(model: bytes, name: str | Path) -> tokenizers.Tokenizer:
    with _library_errors(name, f"({len(model)} bytes) is not a tokenizer.json"):
        tokenizer = tokenizers.Tokenizer.from_buffer(model)
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
    return tokenizer


@contextmanager
def _library_errors(name: str | Path, failure: str) -> Iterator[None]:
    """Turn errors of the tokenizers library into DataError; ``failure`` completes "tokenizer NAME".

    The library raises nothing narrower than Exception, and its PanicException, raised for a panic
    in its Rust code, is not even a subclass of that.
    """
    try:
        yield
    except BaseException as error:
        panicked = type(error).__name__ == "PanicException"
        if isinstance(error, MemoryError) or not (panicked or isinstance(error, Exception)):
            raise
        raise DataError(
            f"tokenizer {name} {failure}: {str(error)[:_SHOWN_ERROR_CHARACTERS]}. Set "
            "--tokenizer-model."
        ) from error


def _decoders(description: dict) -> list[dict]:
    decoder = description.get("decoder") or {"type": "none"}
    return decoder.get("decoders", [decoder])
