"""A sentencepiece model as a vocabulary: exact where the model spells bytes and leaves spaces alone, as ours do.

A model trained elsewhere, Llama's for example, is read as it is and keeps its own habits, such as a space put before
the text.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_ring.errors import DataError

# sentencepiece's sign for a space inside a piece.
SPACE = "▁"
# Long texts are encoded in spans of so many characters: sentencepiece takes some 50 bytes of memory for each.
_SPANS = re.compile(f"{SPACE}|[^{SPACE}]{{1,65536}}")
_SPANS_AT_ONCE = 64


class SentencePieces:
    """The pieces of ``model``, the content of a sentencepiece model file; ``name`` is for messages.

    Raises DataError when ``model`` is no such model.
    """

    def __init__(self, model: bytes, name: str | Path):
        self._pieces = _loaded(model, name)
        self.vocab_size: int = self._pieces.vocab_size()

    def default_end(self) -> int | None:
        """The id of the model's end-of-sentence piece, None where it has none."""
        return self._pieces.eos_id() if self._pieces.eos_id() >= 0 else None

    def default_begin(self) -> int | None:
        """The id of the model's begin-of-sentence piece, None where it has none."""
        return self._pieces.bos_id() if self._pieces.bos_id() >= 0 else None

    def own_begin(self) -> tuple[int, ...]:
        """A model says no more than that it has such a piece; Llama's, Mistral's and Gemma's put it
        before a text."""
        begin = self.default_begin()
        return () if begin is None else (begin,)

    def id_of(self, token: str) -> int | None:
        """The id of ``token``, None where the model has no such piece."""
        found = self._pieces.piece_to_id(token)
        return found if self._pieces.id_to_piece(found) == token else None

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The ids of each text."""
        spans = [self._spans(text) for text in texts]
        ids = self._span_ids(list(chain.from_iterable(spans)))
        return (list(chain.from_iterable(islice(ids, len(own)))) for own in spans)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``; control ids have none."""
        return self._pieces.decode([int(token) for token in tokens])

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for: (V,) int64; 0 for control ids."""
        return np.array([self._bytes_of(token) for token in range(self.vocab_size)], dtype=np.int64)

    def _bytes_of(self, token: int) -> int:
        if self._pieces.is_control(token) or self._pieces.is_unknown(token):
            return 0
        return (
            1
            if self._pieces.is_byte(token)
            else len(self._pieces.id_to_piece(token).replace(SPACE, " ").encode())
        )

    @cached_property
    def _space_symbol(self) -> list[int]:
        return [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @cached_property
    def _exact(self) -> bool:
        """Whether any text may be cut in spans."""
        spaces_kept = "".join(self._pieces.encode("a  b ", out_type=str)) == "a  b ".replace(
            " ", SPACE
        )
        return spaces_kept and all(self._pieces.is_byte(token) for token in self._space_symbol)

    def _spans(self, text: str) -> list[str]:
        return _SPANS.findall(text) if self._exact else [text]

    def _span_ids(self, spans: list[str]) -> Iterator[list[int]]:
        for start in range(0, len(spans), _SPANS_AT_ONCE):
            some = spans[start : start + _SPANS_AT_ONCE]
            for span, ids in zip(some, self._pieces.encode(some, num_threads=1)):
                # sentencepiece would read its own sign for a space as a space.
                yield self._space_symbol if self._exact and span == SPACE else ids


def _loaded(model: bytes, name: str | Path) -> sentencepiece.SentencePieceProcessor:
    damaged = DataError(
        f"tokenizer {name} ({len(model)} bytes) is not a sentencepiece model nor a tokenizer.json. "
        "Set --tokenizer-model, or train one with tools/prepare_data.py --vocab-size."
    )
    # sentencepiece takes an empty file for a model, and then complains on stderr at every use.
    if not model:
        raise damaged
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        # The library takes pieces that are not UTF-8, and then fails wherever one is shown.
        pieces.id_to_piece(list(range(pieces.vocab_size())))
        pieces.decode([pieces.unk_id()])
        return pieces
    except (IndexError, RuntimeError, UnicodeDecodeError) as error:
        raise damaged from error
