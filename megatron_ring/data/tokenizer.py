"""The tokenizer: a sentencepiece model that gives back exactly the text it was given.

That holds for models of tokenizer_training.py. A model trained elsewhere, Llama's for example, is read as it is and
keeps its own habits, such as a space put before the text.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_ring.data.replace_file import replace_file
from megatron_ring.errors import DataError

# sentencepiece's sign for a space inside a piece.
_SPACE = "▁"
# Long texts are encoded in spans of so many characters: sentencepiece takes some 50 bytes of memory for each.
_SPANS = re.compile(f"{_SPACE}|[^{_SPACE}]{{1,65536}}")
_SPANS_AT_ONCE = 64

_REMEDY = "Set --tokenizer-model, or train one with tools/prepare_data.py --vocab-size."


class Tokenizer:
    """Text to token ids and back. ``model`` is the content of a sentencepiece model file, ``name`` is for messages.

    Raises DataError when ``model`` is no such model, or has no end-of-sentence piece to end documents with.
    """

    def __init__(self, model: bytes, name: str | Path):
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._pieces = _loaded(model, name)
        self.vocab_size = self._pieces.vocab_size()
        self.end_of_document = self._pieces.eos_id()
        if self.end_of_document < 0:
            raise DataError(
                f"tokenizer {name} has no end-of-sentence piece, and every document ends with one. Set "
                "--tokenizer-model to another model, or train one with tools/prepare_data.py --vocab-size."
            )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a model file. Raises DataError when it is missing or damaged."""
        try:
            return cls(Path(path).read_bytes(), path)
        except OSError as error:
            raise DataError(f"tokenizer {path} cannot be read: {error.strerror}. {_REMEDY}") from error

    def save(self, path: str | Path) -> None:
        """Write the model file. Raises DataError when another model is there: stores beside it depend on it."""
        path = Path(path)
        if path.exists() and path.read_bytes() != self.model:
            raise DataError(
                f"{path} is another tokenizer, which the token stores beside it were written with. Set "
                f"--tokenizer-model {path} to write with it too, give --output-prefix another folder, or delete it."
            )
        replace_file(path, self.model)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without an end-of-document id. Text is what UTF-8 can hold: no half surrogate pairs."""
        return self.encode_documents([text])[0][:-1].tolist()

    def encode_documents(self, texts: Sequence[str], workers: int = 1) -> list[np.ndarray]:
        """The ids of each text and the end-of-document id after them, int32; ``workers`` threads, the same ids."""
        spans = [self._spans(text) for text in texts]
        ids = self._span_ids(list(chain.from_iterable(spans)), workers)
        return [np.fromiter(chain(*islice(ids, len(own)), [self.end_of_document]), dtype=np.int32) for own in spans]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``; the end-of-document id has none. Bytes that are not UTF-8 become U+FFFD."""
        return self._pieces.decode([int(token) for token in tokens])

    @cached_property
    def bytes_per_token(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for: (V,) int64; 0 for control ids. They add up to the text's length."""
        return np.array([self._piece_bytes(token) for token in range(self.vocab_size)])

    def _piece_bytes(self, token: int) -> int:
        if self._pieces.is_control(token) or self._pieces.is_unknown(token):
            return 0
        return 1 if self._pieces.is_byte(token) else len(self._pieces.id_to_piece(token).replace(_SPACE, " ").encode())

    @cached_property
    def _space_symbol(self) -> list[int]:
        return [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    @cached_property
    def _exact(self) -> bool:
        """Whether any text may be cut in spans: the model has bytes and leaves spaces alone, as ours do."""
        spaces_kept = "".join(self._pieces.encode("a  b ", out_type=str)) == "a  b ".replace(" ", _SPACE)
        return spaces_kept and all(self._pieces.is_byte(token) for token in self._space_symbol)

    def _spans(self, text: str) -> list[str]:
        return _SPANS.findall(text) if self._exact else [text]

    def _span_ids(self, spans: list[str], workers: int) -> Iterator[list[int]]:
        for start in range(0, len(spans), _SPANS_AT_ONCE):
            some = spans[start : start + _SPANS_AT_ONCE]
            for span, ids in zip(some, self._pieces.encode(some, num_threads=workers)):
                # sentencepiece would read its own sign for a space as a space.
                yield self._space_symbol if self._exact and span == _SPACE else ids


def _loaded(model: bytes, name: str | Path) -> sentencepiece.SentencePieceProcessor:
    damaged = DataError(f"tokenizer {name} ({len(model)} bytes) is not a sentencepiece model. {_REMEDY}")
    # sentencepiece takes an empty file for a model, and then complains on stderr at every use.
    if not model:
        raise damaged
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise damaged from error
