"""The tokenizer: text to token ids and back, and the id that ends a document, whichever library reads the model.

A file that begins with ``{`` is a Hugging Face ``tokenizer.json`` (hugging_face_tokens.py), any other a sentencepiece
model (sentencepieces.py). Models of tokenizer_training.py and byte-level BPE give back exactly the text they got.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_ring.data.hugging_face_tokenizer import HuggingFaceTokens
from megatron_ring.data.replace_file import replace_file
from megatron_ring.data.sentencepiece_tokenizer import SentencePieces
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

    Documents end with ``end``, a token by its spelling; without it with the one that the model has
    for that. ``begin`` is the token that may be put before them, and ``adds_begin`` whether the
    tokenizer's configuration asks for that, None where it does not say. Raises DataError when
    ``model`` is no tokenizer, or has no such token.
    """

    def __init__(
        self,
        model: bytes,
        name: str | Path,
        end: str = "",
        begin: str = "",
        adds_begin: bool | None = None,
    ):
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        kind = HuggingFaceTokens if model.lstrip()[:1] == b"{" else SentencePieces
        self.file_name = FILE_NAMES[kind is SentencePieces]
        self._tokens = kind(model, name)
        self._name, self._end, self._begin, self._adds_begin = name, end, begin, adds_begin
        self.vocab_size = self._tokens.vocab_size
        self.end_of_document = self._end_of_document(name)

    @classmethod
    def load(cls, path: str | Path, end: str = "") -> "Tokenizer":
        """Read a tokenizer's file. Without ``end`` the eos_token of a tokenizer_config.json beside it ends documents.

        Raises DataError when the file is missing or damaged.
        """
        config = _read_config(_config_path(path))
        end = end or config.eos_token
        return cls(_content(Path(path)), path, end, config.bos_token, config.add_bos_token)

    def save(self, path: str | Path) -> None:
        """Write the file. Raises DataError when another tokenizer is in the folder: stores there depend on it."""
        path = Path(path)
        for other in {path, *(beside(path, name) for name in FILE_NAMES)}:
            if other.exists() and not self._is_at(other):
                raise DataError(
                    f"{other} is another tokenizer, or ends documents with another token, and the token stores beside "
                    f"it were written with it. Set --tokenizer-model {other} to write with it too, give "
                    "--output-prefix another folder, or delete it."
                )
        # The end comes first: a model found without it would end documents with its own.
        self._save_config(_config_path(path))
        replace_file(path, self.model)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without an end-of-document id. Text is what UTF-8 can hold: no half surrogate pairs."""
        return next(iter(self._tokens.encode([text])))

    def begin_of_document(self, prepend: Literal["auto", "on", "off"]) -> tuple[int, ...]:
        """The ids to put before each document, at most a few and none for ``off``.

        ``auto``: what the tokenizer itself puts before a text (a tokenizer.json by its
        post-processor, a sentencepiece model that has a begin-of-sentence piece, or add_bos_token
        in tokenizer_config.json); ``on``: at least one. Raises DataError where there is no such
        token, or where it is the one that ends documents.
        """
        found = () if prepend == "off" else self._own_begin
        if prepend == "on" and not found:
            found = (self._begin_token(),)
        if self.end_of_document in found:
            raise DataError(
                f"tokenizer {self._name} begins a text with the token that ends documents (id {self.end_of_document}), "
                "so that one could not be told from the other. Set --prepend-bos off, or --eod-token to another token."
            )
        return found

    def encode_documents(
        self, texts: Sequence[str], begin: tuple[int, ...] = ()
    ) -> list[np.ndarray]:
        """The ids of each text, ``begin`` before them and the end-of-document id after them,
        int32."""
        end = self.end_of_document
        return [np.array([*begin, *ids, end], dtype=np.int32) for ids in self._tokens.encode(texts)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``; the ids around a document have none. Bytes that are not UTF-8
        become U+FFFD."""
        silent = {self.end_of_document, *self._own_begin}
        return self._tokens.decode(token for token in tokens if token not in silent)

    @cached_property
    def bytes_per_token(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for: (V,) int64; 0 for control ids. They add up to the text's length."""
        counts = self._tokens.token_bytes()
        counts[[self.end_of_document, *self._own_begin]] = 0
        return counts

    @cached_property
    def _own_begin(self) -> tuple[int, ...]:
        own = self._tokens.own_begin()
        if isinstance(self._tokens, SentencePieces) and self._adds_begin is False:
            return ()
        return own or ((self._begin_token(),) if self._adds_begin else ())

    def _begin_token(self) -> int:
        found = self._tokens.id_of(self._begin) if self._begin else self._tokens.default_begin()
        if found is None:
            wanted = f"token {self._begin!r}" if self._begin else "begin-of-sentence token"
            raise DataError(
                f"tokenizer {self._name} has no {wanted} to put before documents. Set --prepend-bos off, or name "
                "one as bos_token in tokenizer_config.json beside the tokenizer."
            )
        return found

    def _end_of_document(self, name: str | Path) -> int:
        found = self._tokens.id_of(self._end) if self._end else self._tokens.default_end()
        if found is None:
            wanted = (
                f"token {self._end!r}"
                if self._end
                else "end-of-sentence piece or token of a usual name"
            )
            raise DataError(
                f"tokenizer {name} has no {wanted}, and every document ends with one. Set --eod-token to a token that "
                "it has, set --tokenizer-model to another model, or train one with tools/prepare_data.py --vocab-size."
            )
        return found

    def _save_config(self, config: Path) -> None:
        found = _read_config(config)
        if found.eos_token and self._tokens.id_of(found.eos_token) != self.end_of_document:
            raise DataError(
                f"{config} ends documents with {found.eos_token!r}, and the tokenizer to be saved beside it with id "
                f"{self.end_of_document}. Set --eod-token {found.eos_token}, or give --output-prefix another folder."
            )
        own = _Config(self._end, self._begin, self._adds_begin)
        settings = {key: value for key, value in asdict(own).items() if value not in ("", None)}
        if settings and found == _Config():
            replace_file(config, (json.dumps(settings) + "\n").encode())

    def _is_at(self, path: Path) -> bool:
        return (
            _content(path) == self.model
            and Tokenizer.load(path).end_of_document == self.end_of_document
        )


def beside(path: str | Path, name: str, flag: str = "--output-prefix") -> Path:
    """``name`` in the folder of ``path``, which ``flag`` sets. Raises DataError for a path that names no file."""
    path = Path(path)
    if path.name in ("", ".."):
        raise DataError(
            f"{path} is a folder, and the name of a file is needed. Set {flag} to a name in that folder."
        )
    return path.with_name(name)


def _config_path(path: str | Path) -> Path:
    return beside(path, "tokenizer_config.json", "--tokenizer-model")


@dataclass(frozen=True)
class _Config:
    """What of Hugging Face's ``tokenizer_config.json`` is used; empty or None for what it does not
    say."""

    eos_token: str = ""
    bos_token: str = ""
    add_bos_token: bool | None = None


def _read_config(path: Path) -> _Config:
    """The configuration at ``path``, of nothing where there is no such file."""
    if not os.path.lexists(path):
        return _Config()
    with errors_as(DataError, path, "Mend it, or delete it."):
        config = parse_json_object(read_bytes(path))
        added = config.get("add_bos_token")
        if not isinstance(added, bool | None):
            raise UntrustedInputError(
                f"its add_bos_token is {shown(added)}, and must be true or false"
            )
        return _Config(_spelled(config, "eos_token"), _spelled(config, "bos_token"), added)


def _spelled(config: dict, key: str) -> str:
    named = config.get(key)
    spelled = named.get("content") if isinstance(named, dict) else named or ""
    if isinstance(spelled, str):
        return spelled
    raise UntrustedInputError(
        f"its {key} is {shown(named)}, and must be text, or an object with a content"
    )


def _content(path: Path) -> bytes:
    with errors_as(DataError, f"tokenizer {path}", _REMEDY):
        return read_bytes(path, TOKENIZER_BYTES)
