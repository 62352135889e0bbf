"""tokenizer.json: lossless for byte-level BPE, Llama's kind, and the end token found by name."""

import json

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_ring.config import DataConfig
from megatron_ring.data.corpus import gather
from megatron_ring.data.dataset import Dataset
from megatron_ring.data.manifest import tokenizer_path
from megatron_ring.data.prepare import prepare
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.errors import DataError
from tests.data.text import TEXT


def byte_level(special: list[str]) -> bytes:
    """A tokenizer.json of GPT-2's kind, trained on the small text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer(byte_level(["<|endoftext|>", "<|im_end|>"]), "gpt2")


@settings(max_examples=200)
@given(text=st.text(st.sampled_from(" \n\t\r\0▁Ġa<|") | st.characters(codec="utf-8")))
@example(text=TEXT)
@example(text="  <|endoftext|> \n")
def test_any_text_is_lossless_and_its_bytes_add_up(gpt2, text):
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert gpt2.bytes_per_token[ids].sum() == len(text.encode())


def test_no_text_encodes_to_the_end_of_document(gpt2):
    assert gpt2.end_of_document == 0
    assert 0 not in gpt2.encode("<|endoftext|>")
    assert gpt2.decode([*gpt2.encode("one"), 0, *gpt2.encode("two")]) == "onetwo"
    assert gpt2.bytes_per_token[0] == 0


def test_the_end_token_is_the_first_common_name_or_the_given_one():
    assert Tokenizer(byte_level(["<s>", "</s>"]), "a").end_of_document == 1
    assert Tokenizer(byte_level(["</s>", "<|endoftext|>"]), "a").end_of_document == 1
    assert Tokenizer(byte_level(["</s>", "<stop>"]), "a", end="<stop>").end_of_document == 1
    with pytest.raises(
        DataError, match="tokenizer a has no end-of-sentence piece or token .*Set --eod-token"
    ):
        Tokenizer(byte_level(["<stop>"]), "a")


def test_tokens_spelled_as_llamas_are_counted_in_bytes():
    vocabulary = {"</s>": 0, "▁": 1, "▁ä": 2, "<0x0A>": 3, "ä": 4, "<unk>": 5}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("▁", "ä")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="never"), decoders.ByteFallback()]
    )
    llama = Tokenizer(tokenizer.to_str().encode(), "llama")
    assert llama.encode("ä ä\n") == [4, 2, 3]
    assert llama.bytes_per_token[[4, 2, 3]].tolist() == [2, 3, 1]


def test_the_given_end_token_is_saved_beside_the_file(tmp_path):
    tokenizer = Tokenizer(byte_level(["<|endoftext|>", "<stop>"]), "a", end="<stop>")
    tokenizer.save(tmp_path / tokenizer.file_name)
    assert tokenizer_path(tmp_path / "P") == tmp_path / "tokenizer.json"
    assert Tokenizer.load(tmp_path / "tokenizer.json").end_of_document == 1
    with pytest.raises(DataError, match="or ends documents with another token"):
        Tokenizer(tokenizer.model, "a").save(tmp_path / "tokenizer.json")


def test_training_opens_a_store_with_the_end_token_it_was_written_with(tmp_path):
    model = byte_level(["<|endoftext|>", "<stop>"])
    (tmp_path / "a.txt").write_text(TEXT * 9)
    (tmp_path / "b.txt").write_text(TEXT * 9)
    prefix = tmp_path / "store" / "P"
    prepare(gather([tmp_path]), prefix, Tokenizer(model, "a", end="<stop>"))
    config = DataConfig(
        data_path=(str(prefix),), seq_length=64, split=(1.0, 0.0), reset_attention_mask=True
    )
    assert Dataset.open(config, seed=1).tokenizer.end_of_document == 1
    (tmp_path / "store" / "tokenizer_config.json").unlink()
    with pytest.raises(
        DataError, match="ends documents with id 1, .* with 0. Set --tokenizer-model"
    ):
        Dataset.open(config, seed=1)


@pytest.mark.parametrize("eos_token", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_the_eos_token_of_a_hugging_face_configuration_ends_documents(tmp_path, eos_token):
    (tmp_path / "tokenizer.json").write_bytes(byte_level(["<|endoftext|>", "<stop>"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    assert Tokenizer.load(tmp_path / "tokenizer.json").end_of_document == 1
    assert Tokenizer.load(tmp_path / "tokenizer.json", end="<|endoftext|>").end_of_document == 0


def test_a_configuration_with_another_end_token_is_refused_and_not_overwritten(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>", "chat": 1}')
    tokenizer = Tokenizer(byte_level(["<|endoftext|>", "<stop>"]), "a")
    with pytest.raises(
        DataError, match="ends documents with '<stop>', .* id 0. Set --eod-token <stop>"
    ):
        tokenizer.save(tmp_path / "tokenizer.json")
    Tokenizer(tokenizer.model, "a", end="<stop>").save(tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "eos_token": "<stop>",
        "chat": 1,
    }


def test_a_configuration_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(byte_level(["</s>"]))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_folder_holds_only_one_tokenizer(tmp_path, tokenizer, gpt2):
    tokenizer.save(tmp_path / tokenizer.file_name)
    with pytest.raises(DataError, match=r"tokenizer\.model is another tokenizer"):
        gpt2.save(tmp_path / gpt2.file_name)


@pytest.mark.parametrize("content", [b"{}", b"{", b'{"model": {"type": "BPE", "vocab": 5}}'])
def test_a_file_that_is_not_a_tokenizer_is_refused(content):
    with pytest.raises(
        DataError, match=rf"tokenizer a \({len(content)} bytes\) is not a tokenizer\.json: "
    ):
        Tokenizer(content, "a")
