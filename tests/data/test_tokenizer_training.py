"""Training a tokenizer: deterministic, from the whole corpus, and errors for too little text."""

import pytest

from megatron_ring.data.tokenizer_training import train_tokenizer
from megatron_ring.errors import DataError
from tests.data.text import TEXT


def test_training_again_gives_the_same_model(tokenizer):
    assert train_tokenizer([TEXT], 320).fingerprint == tokenizer.fingerprint


def test_training_samples_the_end_of_a_long_corpus():
    late = train_tokenizer([TEXT * 1000] * 30 + ["жук " * 1000] * 100, 320)
    assert len(late.encode("ж")) == 1  # not the two bytes of an unknown character


def test_indentation_is_one_token(tokenizer):
    assert len(tokenizer.encode("        ")) == 1


@pytest.mark.parametrize(
    ("text", "vocab_size", "reason"),
    [
        (TEXT, 4096, r"too high \(4096\)\. Please set it to a value <= \d+"),
        (TEXT, 100, r"100 vs \d+"),
        ("", 400, "nothing to learn from"),
        ("\n\n", 400, "nothing to learn from"),
    ],
)
def test_a_vocabulary_too_large_or_too_small_for_the_text_is_refused(text, vocab_size, reason):
    with pytest.raises(
        DataError, match=f"no tokenizer of {vocab_size} ids .*: .*{reason}.*Set --vocab-size"
    ):
        train_tokenizer([text], vocab_size)
