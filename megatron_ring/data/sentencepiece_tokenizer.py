"""The tokenizer backend for a sentencepiece model.

Encoding is lossless where the model has byte pieces and keeps spaces as they are, as the models of
tokenizer_training.py do. A model trained elsewhere, Llama's for example, keeps its own behaviour,
such as a space added before the text.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_ring.errors import DataError

# sentencepiece's symbol for a space inside a piece.
SPACE = "▁"
# Long texts are encoded in spans of at most 65,536 characters: sentencepiece needs about 50 bytes
# of memory per character.
_SPANS = re.compile(f"{SPACE}|[^{SPACE}]{{1,65536}}")
_SPANS_PER_CALL = 64


class SentencePieceBackend:
    """Encodes and decodes with ``model``, the content of a sentencepiece model file.

    ``name`` is used in error messages. Raises DataError when ``model`` is not such a model.
    """

    def __init__(self, model: bytes, name: str | Path):
        self._pieces = _load(model, name)
        self.vocab_size: int = self._pieces.vocab_size()

    def default_end(self) -> int | None:
        """Return the id of the model's end-of-sentence piece, None if it has none."""
        return self._pieces.eos_id() if self._pieces.eos_id() >= 0 else None

    def default_begin(self) -> int | None:
        """Return the id of the model's begin-of-sentence piece, None if it has none."""
        return self._pieces.bos_id() if self._pieces.bos_id() >= 0 else None

    def own_begin(self) -> tuple[int, ...]:
        """Return the begin-of-sentence id where the model has one.

        A model file does not record whether the piece is put before a text; with the models of
        Llama, Mistral and Gemma it is.
        """
        begin = self.default_begin()
        return () if begin is None else (begin,)

    def id_of(self, token: str) -> int | None:
        """Return the id of ``token``, None if the model has no such piece."""
        piece = self._pieces.piece_to_id(token)
        return piece if self._pieces.id_to_piece(piece) == token else None

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yield the ids of each text."""
        spans_of_texts = [self._spans(text) for text in texts]
        span_ids = self._encode_spans(list(chain.from_iterable(spans_of_texts)))
        for spans in spans_of_texts:
            yield list(chain.from_iterable(islice(span_ids, len(spans))))

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ``tokens``; control ids have none."""
        return self._pieces.decode([int(token) for token in tokens])

    def token_bytes(self) -> np.ndarray:
        """Return the UTF-8 bytes that each id stands for: (V,) int64; 0 for control ids."""
        return np.array([self._bytes_of(token) for token in range(self.vocab_size)], dtype=np.int64)

    def _bytes_of(self, token: int) -> int:
        if self._pieces.is_control(token) or self._pieces.is_unknown(token):
            return 0
        if self._pieces.is_byte(token):
            return 1
        return len(self._pieces.id_to_piece(token).replace(SPACE, " ").encode())

    @cached_property
    def _space_symbol_ids(self) -> list[int]:
        return [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    @cached_property
    def _is_lossless(self) -> bool:
        """Whether spaces are kept and byte pieces exist, so that a text may be cut into spans."""
        encoded = "".join(self._pieces.encode("a  b ", out_type=str))
        keeps_spaces = encoded == "a  b ".replace(" ", SPACE)
        return keeps_spaces and all(self._pieces.is_byte(token) for token in self._space_symbol_ids)

    def _spans(self, text: str) -> list[str]:
        return _SPANS.findall(text) if self._is_lossless else [text]

    def _encode_spans(self, spans: list[str]) -> Iterator[list[int]]:
        for start in range(0, len(spans), _SPANS_PER_CALL):
            some = spans[start : start + _SPANS_PER_CALL]
            for span, ids in zip(some, self._pieces.encode(some, num_threads=1)):
                # sentencepiece would decode its own symbol for a space as a space, so the symbol
                # is encoded by its bytes.
                yield self._space_symbol_ids if self._is_lossless and span == SPACE else ids


def _load(model: bytes, name: str | Path) -> sentencepiece.SentencePieceProcessor:
    invalid = DataError(
        f"tokenizer {name} ({len(model)} bytes) is not a sentencepiece model nor a tokenizer.json. "
        "Set --tokenizer-model, or train one with tools/prepare_data.py --vocab-size."
    )
    # sentencepiece accepts an empty file as a model, and then prints an error at every use.
    if not model:
        raise invalid
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        # The library accepts pieces that are not UTF-8 and fails later, wherever one is decoded.
        pieces.id_to_piece(list(range(pieces.vocab_size())))
        pieces.decode([pieces.unk_id()])
        return pieces
    except (IndexError, RuntimeError, UnicodeDecodeError) as error:
        raise invalid from error
