"""Training a tokenizer: the same each time, from the whole corpus, and clear about what a text cannot give."""

import pytest

from megatron_ring.data.tokenizer_training import train_tokenizer
from megatron_ring.errors import DataError
from tests.data.text import TEXT


def test_training_again_gives_the_same_model(tokenizer):
    assert train_tokenizer([TEXT], 320).fingerprint == tokenizer.fingerprint


def test_training_sees_the_end_of_a_long_corpus():
    late = train_tokenizer([TEXT * 1000] * 30 + ["жук " * 1000] * 100, 320)
    assert len(late.encode("ж")) == 1  # and not the two bytes of a character that was never met


def test_indentation_is_one_token(tokenizer):
    assert len(tokenizer.encode("        ")) == 1


@pytest.mark.parametrize(
    ("text", "vocab_size", "reason"),
    [
        (TEXT, 4096, r"too high \(4096\)\. Please set it to a value <= \d+"),
        (TEXT, 100, r"100 vs \d+"),
        ("", 400, "there is nothing in it to learn from"),
        ("\n\n", 400, "there is nothing in it to learn from"),
    ],
)
def test_a_vocabulary_that_the_text_cannot_give_is_refused(text, vocab_size, reason):
    with pytest.raises(
        DataError, match=f"no tokenizer of {vocab_size} ids .*: .*{reason}.*Set --vocab-size"
    ):
        train_tokenizer([text], vocab_size)
