"""BOS before documents: added as the tokenizer does or on demand, and recorded in the manifest."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from megatron_ring.config import DataConfig
from megatron_ring.data.corpus import gather
from megatron_ring.data.dataset import Dataset
from megatron_ring.data.inspection import verify
from megatron_ring.data.manifest import Manifest, manifest_path, read_manifest
from megatron_ring.data.prepare import prepare
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import DataError
from tests.data.text import TEXT
from tools.inspect_data import main as inspect_data
from tools.prepare_data import main as prepare_data

BOS, EOS = 256, 257


def byte_level(folder: Path, template: str = "", config: dict | None = None) -> Path:
    """Write a tokenizer.json with a token per byte, <s> and </s>.

    ``template`` is its post-processor and ``config`` its tokenizer_config.json.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {spelling: n for n, spelling in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if template:
        special = [("<s>", BOS), ("</s>", EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def sentencepiece_model(**options) -> bytes:
    """A small sentencepiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.mark.parametrize(
    ("template", "config", "auto"),
    [
        ("", None, ()),
        ("$A </s>", None, ()),
        ("<s> $A", None, (BOS,)),
        ("<s> $A </s>", {"eos_token": "</s>", "bos_token": "<s>"}, (BOS,)),
        ("<s> <s> $A", None, (BOS, BOS)),
        ("", {"bos_token": "<s>"}, ()),
        ("", {"bos_token": {"content": "<s>"}, "add_bos_token": True}, (BOS,)),
        ("", {"add_bos_token": True}, (BOS,)),
        ("", {"bos_token": "<s>", "add_bos_token": False}, ()),
        ("", {"bos_token": None, "add_bos_token": None}, ()),
    ],
)
def test_auto_follows_the_tokenizer(tmp_path, template, config, auto):
    tokenizer = Tokenizer.load(byte_level(tmp_path, template, config))
    assert tokenizer.begin_of_document("auto") == auto
    assert tokenizer.begin_of_document("on") == (auto or (BOS,))
    assert tokenizer.begin_of_document("off") == ()


def test_a_sentencepiece_model_with_a_bos_piece_adds_it_by_convention(tmp_path, tokenizer):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    llama = Tokenizer.load(tmp_path / "tokenizer.model")
    assert llama.begin_of_document("auto") == llama.begin_of_document("on") == (1,)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    llama = Tokenizer.load(tmp_path / "tokenizer.model")
    assert llama.begin_of_document("auto") == ()
    assert llama.begin_of_document("on") == (1,)
    # The model that train_tokenizer makes has none.
    assert tokenizer.begin_of_document("auto") == ()
    with pytest.raises(DataError, match=r"no begin-of-sentence token.*--prepend-bos off"):
        tokenizer.begin_of_document("on")


@pytest.mark.parametrize("template", ["", "<s> $A", "<s> $A </s>"])
def test_documents_equal_those_of_transformers(tmp_path, template):
    transformers = pytest.importorskip("transformers")
    model = byte_level(tmp_path, template)
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(model), eos_token="</s>")
    tokenizer = Tokenizer.load(model)
    texts = ["one", "", " zwölf\n"]
    documents = tokenizer.encode_documents(texts, tokenizer.begin_of_document("auto"))
    for text, document in zip(texts, documents):
        without_end = [token for token in reference(text).input_ids if token != EOS]
        assert document.tolist() == [*without_end, EOS]


def test_a_bos_equal_to_the_end_token_is_refused(tmp_path):
    model = byte_level(tmp_path, "</s> $A")
    for prepend in ("auto", "on"):
        with pytest.raises(DataError, match=rf"id {EOS}.*--prepend-bos off, or --eod-token"):
            Tokenizer.load(model).begin_of_document(prepend)
    assert Tokenizer.load(model).begin_of_document("off") == ()
    assert Tokenizer.load(model, "<s>").begin_of_document("auto") == (EOS,)


def test_a_bos_outside_the_vocabulary_is_refused(tmp_path):
    model = byte_level(tmp_path, "", {"bos_token": "<bos>", "add_bos_token": True})
    with pytest.raises(DataError, match=r"no token '<bos>'.*--prepend-bos off"):
        Tokenizer.load(model).begin_of_document("auto")


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": 5},
        {"bos_token": {"id": 3}},
        {"add_bos_token": "yes"},
        {"eos_token": {"content": 5}},
        [],
    ],
)
def test_a_configuration_of_wrong_types_is_refused(tmp_path, config):
    with pytest.raises(
        DataError, match=r"tokenizer_config\.json.*(bos_token|eos_token|object).*delete it"
    ):
        Tokenizer.load(byte_level(tmp_path, "", config))


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text").mkdir()
    for name in ("a", "b"):
        (tmp_path / "text" / f"{name}.txt").write_text(f"{name} {TEXT}")
    return tmp_path / "text"


@pytest.mark.parametrize(("flags", "begin"), [([], [BOS]), (["--prepend-bos", "off"], [])])
def test_documents_and_manifest_have_the_bos(text, tmp_path, capsys, flags, begin):
    model = byte_level(tmp_path / "model", "<s> $A")
    prefix = tmp_path / "store" / "P"
    arguments = ["--input", str(text), "--output-prefix", str(prefix)]
    assert prepare_data([*arguments, "--tokenizer-model", str(model), *flags]) == 0
    assert ("begin with ids [256]" in capsys.readouterr().out) == bool(begin)
    store = TokenStore(prefix)
    manifest = read_manifest(prefix)
    tokenizer = Tokenizer.load(model)
    assert manifest.begin_of_document == tuple(begin)
    for number, name in enumerate("ab"):
        document = store.document(number).tolist()
        assert document == [*begin, *tokenizer.encode(f"{name} {TEXT}"), EOS]
        assert tokenizer.decode(document) == f"{name} {TEXT}"
        assert tokenizer.bytes_per_token[document].sum() == len(f"{name} {TEXT}")
    assert manifest.tokens == sum(store.lengths)
    assert manifest.bytes == 2 * len(f"a {TEXT}")
    inspect_data([str(prefix), "--verify"])


def test_auto_is_the_same_for_the_tokenizer_saved_beside_the_store(text, tmp_path):
    config = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True}
    first = Tokenizer.load(byte_level(tmp_path / "model", "", config))
    prepare(gather([text]), tmp_path / "store" / "P", first)
    again = Tokenizer.load(tmp_path / "store" / "tokenizer.json")
    assert again.begin_of_document("auto") == (BOS,)


def test_stores_with_and_without_bos_cannot_be_blended(text, tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path / "model", "<s> $A"))
    corpus = gather([text])
    for name in ("auto", "off"):
        prepare(corpus, tmp_path / name / "P", tokenizer, prepend_bos=name)
    path = ("1", str(tmp_path / "auto" / "P"), "1", str(tmp_path / "off" / "P"))
    config = DataConfig(data_path=path, seq_length=8, split=(1.0, 0.0))
    with pytest.raises(DataError, match=r"cannot be blended.*\[256\].*\[\].*--prepend-bos"):
        Dataset.open(config, seed=1)
    # A store without a manifest does not record its BOS and is accepted.
    manifest_path(tmp_path / "off" / "P").unlink()
    assert Dataset.open(config, seed=1).training.seq_length == 8


def test_a_shard_finished_without_bos_is_not_reused_with_bos(text, tmp_path, monkeypatch):
    tokenizer = Tokenizer.load(byte_level(tmp_path / "model", "<s> $A"))
    prefix = tmp_path / "P"
    monkeypatch.setattr("megatron_ring.data.prepare._join", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(gather([text]), prefix, tokenizer, prepend_bos="off")
    monkeypatch.undo()
    prepare(gather([text]), prefix, tokenizer)
    assert TokenStore(prefix).document(0)[0] == BOS


def test_verify_finds_a_document_without_the_bos_of_its_manifest(text, tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path / "model"))
    manifest = prepare(gather([text]), tmp_path / "P", tokenizer).manifest
    other = Manifest(**{**vars(manifest), "begin_of_document": (BOS,)})
    with pytest.raises(DataError, match=r"document 0 begins with ids \[64\], .* \[256\]"):
        verify(TokenStore(tmp_path / "P"), other, tokenizer)


@pytest.mark.parametrize(
    ("id", "is_legal"), [((1 << 22) - 1, True), (1 << 22, False), (1 << 30, False)]
)
def test_token_ids_are_limited_to_2_to_the_22(tmp_path, id, is_legal):
    model = byte_level(tmp_path)
    description = json.loads(model.read_text())
    description["model"]["vocab"]["far"] = id
    model.write_text(json.dumps(description))
    if is_legal:
        assert Tokenizer.load(model).vocab_size == id + 1
        assert Tokenizer.load(model).bytes_per_token[[64, id]].tolist() == [1, 3]
    else:
        with pytest.raises(DataError, match=rf"id {id} among its 259 tokens.*4194303"):
            Tokenizer.load(model)
