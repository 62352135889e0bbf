"""The tokenizer: text to token ids and back, and the id that ends a document, whichever library reads the model.

A file that begins with ``{`` is a Hugging Face ``tokenizer.json`` (hugging_face_tokens.py), any other a sentencepiece
model (sentencepieces.py). Models of tokenizer_training.py and byte-level BPE give back exactly the text they got.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_ring.data.hugging_face_tokens import HuggingFaceTokens
from megatron_ring.data.replace_file import replace_file
from megatron_ring.data.sentencepieces import SentencePieces
from megatron_ring.errors import DataError
from megatron_ring.untrusted import (
    TOKENIZER_BYTES,
    UntrustedInputError,
    errors_as,
    parse_json_object,
    read_bytes,
    shown,
)

FILE_NAMES = ("tokenizer.json", "tokenizer.model")
"""The names a tokenizer has beside a store, Hugging Face's and sentencepiece's."""

_REMEDY = "Set --tokenizer-model, or train one with tools/prepare_data.py --vocab-size."


class Tokenizer:
    """Text to token ids and back. ``model`` is the content of a tokenizer's file, ``name`` is for messages.

    Documents end with ``end``, a token by its spelling; without it with the one that the model has for that. Raises
    DataError when ``model`` is no tokenizer, or has no such token.
    """

    def __init__(self, model: bytes, name: str | Path, end: str = ""):
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        kind = HuggingFaceTokens if model.lstrip()[:1] == b"{" else SentencePieces
        self.file_name = FILE_NAMES[kind is SentencePieces]
        self._tokens = kind(model, name)
        self._end = end
        self.vocab_size = self._tokens.vocab_size
        self.end_of_document = self._end_of_document(name)

    @classmethod
    def load(cls, path: str | Path, end: str = "") -> "Tokenizer":
        """Read a tokenizer's file. Without ``end`` the eos_token of a tokenizer_config.json beside it ends documents.

        Raises DataError when the file is missing or damaged.
        """
        return cls(_content(Path(path)), path, end or _configured_end(_config_path(path)))

    def save(self, path: str | Path) -> None:
        """Write the file. Raises DataError when another tokenizer is in the folder: stores there depend on it."""
        path = Path(path)
        for other in {path, *(path.with_name(name) for name in FILE_NAMES)}:
            if other.exists() and not self._is_at(other):
                raise DataError(
                    f"{other} is another tokenizer, or ends documents with another token, and the token stores beside "
                    f"it were written with it. Set --tokenizer-model {other} to write with it too, give "
                    "--output-prefix another folder, or delete it."
                )
        # The end comes first: a model found without it would end documents with its own.
        self._save_end(_config_path(path))
        replace_file(path, self.model)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without an end-of-document id. Text is what UTF-8 can hold: no half surrogate pairs."""
        return next(iter(self._tokens.encode([text])))

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text and the end-of-document id after them, int32."""
        return [np.array([*ids, self.end_of_document], dtype=np.int32) for ids in self._tokens.encode(texts)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``; the end-of-document id has none. Bytes that are not UTF-8 become U+FFFD."""
        return self._tokens.decode(token for token in tokens if token != self.end_of_document)

    @cached_property
    def bytes_per_token(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for: (V,) int64; 0 for control ids. They add up to the text's length."""
        counts = np.array([self._tokens.token_bytes(token) for token in range(self.vocab_size)])
        counts[self.end_of_document] = 0
        return counts

    def _end_of_document(self, name: str | Path) -> int:
        found = self._tokens.id_of(self._end) if self._end else self._tokens.default_end()
        if found is None:
            wanted = f"token {self._end!r}" if self._end else "end-of-sentence piece or token of a usual name"
            raise DataError(
                f"tokenizer {name} has no {wanted}, and every document ends with one. Set --eod-token to a token that "
                "it has, set --tokenizer-model to another model, or train one with tools/prepare_data.py --vocab-size."
            )
        return found

    def _save_end(self, config: Path) -> None:
        configured = _configured_end(config)
        if configured and self._tokens.id_of(configured) != self.end_of_document:
            raise DataError(
                f"{config} ends documents with {configured!r}, and the tokenizer to be saved beside it with id "
                f"{self.end_of_document}. Set --eod-token {configured}, or give --output-prefix another folder."
            )
        if self._end and not configured:
            replace_file(config, (json.dumps({"eos_token": self._end}) + "\n").encode())

    def _is_at(self, path: Path) -> bool:
        return _content(path) == self.model and Tokenizer.load(path).end_of_document == self.end_of_document


def _config_path(path: str | Path) -> Path:
    return Path(path).with_name("tokenizer_config.json")


def _configured_end(path: Path) -> str:
    """What Hugging Face's ``tokenizer_config.json`` names as ``eos_token``, empty where there is no such file."""
    if not os.path.lexists(path):
        return ""
    with errors_as(DataError, path, "Mend it, or delete it."):
        named = parse_json_object(read_bytes(path)).get("eos_token")
        spelled = named.get("content") if isinstance(named, dict) else named or ""
        if isinstance(spelled, str):
            return spelled
        raise UntrustedInputError(f"its eos_token is {shown(named)}, and must be text, or an object with a content")


def _content(path: Path) -> bytes:
    with errors_as(DataError, f"tokenizer {path}", _REMEDY):
        return read_bytes(path, TOKENIZER_BYTES)
