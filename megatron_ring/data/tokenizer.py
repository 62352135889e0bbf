"""The tokenizer: text to token ids and back, and the ids that begin and end a document.

A file that begins with ``{`` is a Hugging Face ``tokenizer.json`` (hugging_face_tokenizer.py), any
other a sentencepiece model (sentencepiece_tokenizer.py). Models of tokenizer_training.py and
byte-level BPE are lossless: decoding returns exactly the text that was encoded.
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

from megatron_ring.data.hugging_face_tokenizer import HuggingFaceBackend
from megatron_ring.data.sentencepiece_tokenizer import SentencePieceBackend
from megatron_ring.errors import DataError
from megatron_ring.untrusted import (
    TOKENIZER_BYTES,
    UntrustedInputError,
    errors_as,
    parse_json_object,
    read_bytes,
    replace_file,
    shown,
)

FILE_NAMES = ("tokenizer.json", "tokenizer.model")
"""The names of a tokenizer in a store's folder: Hugging Face's and sentencepiece's."""

_REMEDY = "Set --tokenizer-model, or train one with tools/prepare_data.py --vocab-size."


class Tokenizer:
    """Text to token ids and back. ``model`` is the content of a tokenizer file.

    - ``name`` is used in error messages.
    - ``end`` is the token that ends documents, by its spelling; by default the one that the model
      has for this purpose.
    - ``begin`` is the token that may be put before documents, and ``adds_begin`` whether the
      tokenizer's configuration enables it, None where that is not configured.

    Raises DataError when ``model`` is not a tokenizer, or has no such token.
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
        is_json = model.lstrip()[:1] == b"{"
        self.file_name = FILE_NAMES[0] if is_json else FILE_NAMES[1]
        self._backend = (HuggingFaceBackend if is_json else SentencePieceBackend)(model, name)
        self._name = name
        self._end = end
        self._begin = begin
        self._adds_begin = adds_begin
        self.vocab_size = self._backend.vocab_size
        self.end_of_document = self._find_end_of_document()

    @classmethod
    def load(cls, path: str | Path, end: str = "") -> "Tokenizer":
        """Read a tokenizer file.

        Without ``end`` documents end with the eos_token of a tokenizer_config.json in the same
        folder, if there is one. Raises DataError when a file is missing or damaged.
        """
        config = _read_config(_config_path(path))
        end = end or config.eos_token
        return cls(_read_model(Path(path)), path, end, config.bos_token, config.add_bos_token)

    def save(self, path: str | Path) -> None:
        """Write the file.

        Raises DataError when the folder has another tokenizer, because the stores in it depend on
        that one.
        """
        path = Path(path)
        for other in {path, *(beside(path, name) for name in FILE_NAMES)}:
            if other.exists() and not self._is_saved_at(other):
                raise DataError(
                    f"{other} is another tokenizer, or ends documents with another token, and the "
                    "token stores in its folder were written with it. Set --tokenizer-model "
                    f"{other} to use it too, set --output-prefix to another folder, or delete it."
                )
        # The configuration first: a model found without it would end documents with its default.
        self._save_config(_config_path(path))
        replace_file(path, self.model)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without an end-of-document id.

        ``text`` must be encodable in UTF-8, that is without unpaired surrogates.
        """
        return next(iter(self._backend.encode([text])))

    def begin_of_document(self, prepend: Literal["auto", "on", "off"]) -> tuple[int, ...]:
        """Return the ids to put before each document: usually one, none for ``off``.

        ``auto`` follows the tokenizer: the post-processor of a tokenizer.json, the
        begin-of-sentence piece of a sentencepiece model, or add_bos_token in tokenizer_config.json.
        ``on`` gives at least one id. Raises DataError where there is no such token, or where it is
        the one that ends documents.
        """
        begin = () if prepend == "off" else self._own_begin
        if prepend == "on" and not begin:
            begin = (self._begin_token(),)
        if self.end_of_document in begin:
            raise DataError(
                f"tokenizer {self._name} begins a text with the token that ends documents (id "
                f"{self.end_of_document}), so the two cannot be distinguished. Set --prepend-bos "
                "off, or --eod-token to another token."
            )
        return begin

    def encode_documents(
        self, texts: Sequence[str], begin: tuple[int, ...] = ()
    ) -> list[np.ndarray]:
        """Return the ids of each text, between ``begin`` and the end-of-document id, as int32."""
        end = self.end_of_document
        return [
            np.array([*begin, *ids, end], dtype=np.int32) for ids in self._backend.encode(texts)
        ]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ``tokens``; the ids that begin and end documents have none.

        Bytes that are not UTF-8 become U+FFFD.
        """
        without_text = {self.end_of_document, *self._own_begin}
        return self._backend.decode(token for token in tokens if token not in without_text)

    @cached_property
    def bytes_per_token(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for: (V,) int64; 0 for control ids.

        Over the tokens of a text they add up to its length.
        """
        counts = self._backend.token_bytes()
        counts[[self.end_of_document, *self._own_begin]] = 0
        return counts

    @cached_property
    def _own_begin(self) -> tuple[int, ...]:
        own = self._backend.own_begin()
        if isinstance(self._backend, SentencePieceBackend) and self._adds_begin is False:
            return ()
        if own or not self._adds_begin:
            return own
        return (self._begin_token(),)

    def _begin_token(self) -> int:
        token = self._backend.id_of(self._begin) if self._begin else self._backend.default_begin()
        if token is None:
            missing = f"token {self._begin!r}" if self._begin else "begin-of-sentence token"
            raise DataError(
                f"tokenizer {self._name} has no {missing} to put before documents. Set "
                "--prepend-bos off, or name one as bos_token in tokenizer_config.json beside the "
                "tokenizer."
            )
        return token

    def _find_end_of_document(self) -> int:
        token = self._backend.id_of(self._end) if self._end else self._backend.default_end()
        if token is None:
            missing = (
                f"token {self._end!r}"
                if self._end
                else "end-of-sentence piece or token with a common name"
            )
            raise DataError(
                f"tokenizer {self._name} has no {missing}, and every document ends with one. Set "
                "--eod-token to a token that it has, set --tokenizer-model to another model, or "
                "train one with tools/prepare_data.py --vocab-size."
            )
        return token

    def _save_config(self, path: Path) -> None:
        """Write tokenizer_config.json if there is none; refuse one with another end token."""
        present = _read_config(path)
        if present.eos_token and self._backend.id_of(present.eos_token) != self.end_of_document:
            raise DataError(
                f"{path} ends documents with {present.eos_token!r}, and the tokenizer to be saved "
                f"beside it with id {self.end_of_document}. Set --eod-token {present.eos_token}, "
                "or set --output-prefix to another folder."
            )
        own = asdict(_Config(self._end, self._begin, self._adds_begin))
        settings = {key: value for key, value in own.items() if value not in ("", None)}
        if settings and present == _Config():
            replace_file(path, (json.dumps(settings) + "\n").encode())

    def _is_saved_at(self, path: Path) -> bool:
        return (
            _read_model(path) == self.model
            and Tokenizer.load(path).end_of_document == self.end_of_document
        )


def beside(path: str | Path, name: str, flag: str = "--output-prefix") -> Path:
    """Return ``name`` in the folder of the file ``path``, which ``flag`` sets.

    Raises DataError where ``path`` is a folder rather than the name of a file.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise DataError(
            f"{path} is a folder, and the name of a file is needed. Set {flag} to a name in that "
            "folder."
        )
    return path.with_name(name)


def _config_path(path: str | Path) -> Path:
    return beside(path, "tokenizer_config.json", "--tokenizer-model")


@dataclass(frozen=True)
class _Config:
    """The keys of Hugging Face's ``tokenizer_config.json`` that are used; "" or None if absent."""

    eos_token: str = ""
    bos_token: str = ""
    add_bos_token: bool | None = None


def _read_config(path: Path) -> _Config:
    """Read the configuration at ``path``; empty where there is no such file."""
    if not os.path.lexists(path):
        return _Config()
    with errors_as(DataError, path, "Fix it, or delete it."):
        config = parse_json_object(read_bytes(path))
        add_bos_token = config.get("add_bos_token")
        if not isinstance(add_bos_token, bool | None):
            raise UntrustedInputError(
                f"its add_bos_token is {shown(add_bos_token)}, and must be true or false"
            )
        return _Config(
            _token_spelling(config, "eos_token"),
            _token_spelling(config, "bos_token"),
            add_bos_token,
        )


def _token_spelling(config: dict, key: str) -> str:
    """Return a token given as text or as an object with its ``content``, "" if absent."""
    value = config.get(key)
    spelling = value.get("content") if isinstance(value, dict) else value or ""
    if isinstance(spelling, str):
        return spelling
    raise UntrustedInputError(
        f"its {key} is {shown(value)}, and must be text, or an object with a content"
    )


def _read_model(path: Path) -> bytes:
    with errors_as(DataError, f"tokenizer {path}", _REMEDY):
        return read_bytes(path, TOKENIZER_BYTES)
