"""Training a tokenizer: byte pairs (Sennrich et al. 2016) over bytes, nothing normalized, so that no text is lost.

Indentation, blank lines and every character survive, because sentencepiece is told to leave spaces alone and to spell
in bytes what its vocabulary does not have.
"""

import io
from collections.abc import Iterable, Iterator

import sentencepiece

from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.errors import DataError

_CHUNK = 4096
_TRAINING_SAMPLE = 4_000_000
_TRAINING = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    # Runs of spaces become pieces: a line of code pays one token for its indentation.
    "allow_whitespace_only_pieces": True,
    "max_sentence_length": 4 * _CHUNK,
    "unk_id": 0,
    "eos_id": 1,
    "bos_id": -1,
    "pad_id": -1,
    "minloglevel": 2,
}


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-pair tokenizer of ``vocab_size`` ids; the same documents give the same model.

    Learns from an evenly spaced sample of 2 to 4 million characters. Raises DataError when the documents have no
    text, or too little or too varied text for a vocabulary of that size.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample(documents)),
            model_writer=model,
            vocab_size=vocab_size,
            **_TRAINING,
        )
    except RuntimeError as error:
        raise DataError(
            f"no tokenizer of {vocab_size} ids can be trained on this text: {_reason(error)} Set --vocab-size, give "
            "more text, or use a tokenizer that exists with --tokenizer-model."
        ) from error
    return Tokenizer(model.getvalue(), "just trained")


def _sample(documents: Iterable[str]) -> list[str]:
    """Every n-th chunk of the text, n doubling whenever the sample is full: one pass, evenly spaced."""
    kept: list[str] = []
    size, every = 0, 1
    for number, chunk in enumerate(_chunks(documents)):
        if number % every == 0:
            kept.append(chunk)
            size += len(chunk)
        if size > _TRAINING_SAMPLE:
            kept, every = kept[::2], 2 * every
            size = sum(map(len, kept))
    return kept


def _chunks(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        yield from (text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK))


def _reason(error: RuntimeError) -> str:
    """sentencepiece's own words, without the place in its source; it has none for text that is all white space."""
    return str(error).rpartition("] ")[2] or "there is nothing in it to learn from."
