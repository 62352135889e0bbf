"""Train a tokenizer: byte-pair encoding (Sennrich et al. 2016) with byte fallback, lossless.

Indentation, blank lines and every character survive, because sentencepiece is configured to leave
text unnormalized, to keep spaces, and to encode characters outside its vocabulary as bytes.
"""

import io
from collections.abc import Iterable, Iterator

import sentencepiece

from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.errors import DataError

_CHUNK = 4096
_LARGEST_SAMPLE_CHARACTERS = 4_000_000
_TRAINER_OPTIONS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    # Runs of spaces become pieces: the indentation of a line of code costs one token.
    "allow_whitespace_only_pieces": True,
    "max_sentence_length": 4 * _CHUNK,
    "unk_id": 0,
    "eos_id": 1,
    "bos_id": -1,
    "pad_id": -1,
    "minloglevel": 2,
}


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-pair tokenizer of ``vocab_size`` ids; the same documents give the same model.

    Learns from an evenly spaced sample of 2 to 4 million characters. Raises DataError when the
    documents have no text, or too little or too varied text for a vocabulary of that size.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample(documents)),
            model_writer=model,
            vocab_size=vocab_size,
            **_TRAINER_OPTIONS,
        )
    except RuntimeError as error:
        raise DataError(
            f"no tokenizer of {vocab_size} ids can be trained on this text: {_reason(error)} Set "
            "--vocab-size, provide more text, or use an existing tokenizer with --tokenizer-model."
        ) from error
    return Tokenizer(model.getvalue(), "just trained")


def _sample(documents: Iterable[str]) -> list[str]:
    """Keep every n-th chunk of the text, n doubling whenever the sample is full.

    The sample is evenly spaced, and one pass suffices although the length of the text is unknown.
    """
    kept: list[str] = []
    size = 0
    every = 1
    for number, chunk in enumerate(_chunks(documents)):
        if number % every == 0:
            kept.append(chunk)
            size += len(chunk)
        if size > _LARGEST_SAMPLE_CHARACTERS:
            kept = kept[::2]
            every *= 2
            size = sum(map(len, kept))
    return kept


def _chunks(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        for start in range(0, len(text), _CHUNK):
            yield text[start : start + _CHUNK]


def _reason(error: RuntimeError) -> str:
    """Return sentencepiece's message without the location in its source.

    The message is empty for text that is all white space.
    """
    return str(error).rpartition("] ")[2] or "the text has nothing to learn from."
