"""The tokenizer: lossless on any text, and errors for models it cannot use."""

import io

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokenizer_training import train_tokenizer
from megatron_ring.errors import DataError
from tests.data.text import TEXT

# Characters that sentencepiece treats specially are drawn more often than the rest of Unicode.
ANY_TEXT = st.text(
    st.sampled_from(" \n\t\r\0▁▅a<s>⁇\u00a0\ufeff\ufffd") | st.characters(codec="utf-8")
)


@settings(max_examples=300)
@given(text=ANY_TEXT)
@example(text=TEXT)
@example(text="  leading,  inner and trailing  ")
@example(text="</s><unk><0x0A>")
@example(text="▁ ▁▁")
def test_decode_returns_exactly_the_encoded_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300)
@given(text=ANY_TEXT)
def test_bytes_per_token_add_up_to_the_length_of_the_text(tokenizer, text):
    assert tokenizer.bytes_per_token[tokenizer.encode(text)].sum() == len(text.encode())


def test_bytes_per_token_of_each_kind_of_id(tokenizer):
    assert len(tokenizer.bytes_per_token) == tokenizer.vocab_size == 320
    assert tokenizer.bytes_per_token[tokenizer.end_of_document] == 0
    assert tokenizer.bytes_per_token[tokenizer.encode("\x80")].tolist() == [1, 1]
    assert tokenizer.bytes_per_token[tokenizer.encode("    ")].sum() == 4


def test_the_end_of_document_has_no_text_and_no_text_encodes_to_it(tokenizer):
    ids = [*tokenizer.encode("one"), tokenizer.end_of_document, *tokenizer.encode("two")]
    assert tokenizer.decode(ids) == "onetwo"
    assert tokenizer.end_of_document not in tokenizer.encode("</s>")


def test_a_text_longer_than_a_span_is_lossless(tokenizer):
    text = TEXT * 1000 + "▁" + TEXT
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_documents_end_with_the_end_of_document(tokenizer):
    documents = ["", "a", TEXT * 500, "b▁c"] * 30
    encoded = [ids.tolist() for ids in tokenizer.encode_documents(documents)]
    assert encoded == [[*tokenizer.encode(text), tokenizer.end_of_document] for text in documents]


def test_a_document_may_end_with_any_token_of_the_model(tokenizer):
    named = Tokenizer(tokenizer.model, "named", end="<unk>")
    assert named.encode_documents(["a"])[0].tolist() == [*tokenizer.encode("a"), 0]
    with pytest.raises(
        DataError,
        match="tokenizer named has no token '<stop>', .*Set --eod-token",
    ):
        Tokenizer(tokenizer.model, "named", end="<stop>")


def test_a_saved_tokenizer_is_loaded_unchanged(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "folder" / "tokenizer.model")
    loaded = Tokenizer.load(tmp_path / "folder" / "tokenizer.model")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["tokenizer.model"]


def test_saving_over_another_tokenizer_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.model")
    tokenizer.save(tmp_path / "tokenizer.model")
    with pytest.raises(
        DataError, match=r"tokenizer\.model is another tokenizer.*Set --tokenizer-model"
    ):
        train_tokenizer([TEXT], 300).save(tmp_path / "tokenizer.model")


def trained_elsewhere(**options) -> bytes:
    """A model with sentencepiece's defaults: a space is added in front, and no byte pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT]),
        model_writer=model,
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def test_a_model_trained_elsewhere_keeps_its_own_behaviour():
    model = trained_elsewhere()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ("a▁b", TEXT * 1000):
        assert Tokenizer(model, "theirs").encode(text) == theirs.encode(text)


def test_a_model_without_an_end_is_refused():
    with pytest.raises(
        DataError, match=r"tokenizer endless has no end-of-sentence piece.*Set --eod-token"
    ):
        Tokenizer(trained_elsewhere(eos_id=-1), "endless")


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(
        DataError,
        match=r"none\.model cannot be read: No such file.*Set --tokenizer-model, or train",
    ):
        Tokenizer.load(tmp_path / "none.model")


@pytest.mark.parametrize("content", [b"", b"this is a README"])
def test_a_file_that_is_not_a_model_is_refused(tmp_path, content):
    (tmp_path / "a.model").write_bytes(content)
    with pytest.raises(
        DataError, match=rf"a\.model \({len(content)} bytes\) is not a sentencepiece model"
    ):
        Tokenizer.load(tmp_path / "a.model")
