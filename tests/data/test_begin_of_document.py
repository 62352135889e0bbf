"""BOS before documents: where the tokenizer itself puts one, on demand, and recorded."""

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
    """A tokenizer.json with a token for each byte, <s> and </s>; ``template`` is its post-processor."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(
        models.BPE(vocab={spelled: n for n, spelled in enumerate(alphabet)}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    if template:
        special = [("<s>", BOS), ("</s>", EOS)]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def pieces(**options) -> bytes:
    """A small sentencepiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
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
def test_auto_is_what_the_tokenizer_itself_does(tmp_path, template, config, auto):
    tokenizer = Tokenizer.load(byte_level(tmp_path, template, config))
    assert tokenizer.begin_of_document("auto") == auto
    assert tokenizer.begin_of_document("on") == (auto or (BOS,))
    assert tokenizer.begin_of_document("off") == ()


def test_a_sentencepiece_model_has_one_by_convention(tmp_path, tokenizer):
    (tmp_path / "tokenizer.model").write_bytes(pieces())
    llama = Tokenizer.load(tmp_path / "tokenizer.model")
    assert llama.begin_of_document("auto") == llama.begin_of_document("on") == (1,)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    llama = Tokenizer.load(tmp_path / "tokenizer.model")
    assert llama.begin_of_document("auto") == ()
    assert llama.begin_of_document("on") == (1,)
    # The model of our own training has none.
    assert tokenizer.begin_of_document("auto") == ()
    with pytest.raises(DataError, match=r"no begin-of-sentence token.*--prepend-bos off"):
        tokenizer.begin_of_document("on")


@pytest.mark.parametrize("template", ["", "<s> $A", "<s> $A </s>"])
def test_documents_are_transformers_own(tmp_path, template):
    transformers = pytest.importorskip("transformers")
    model = byte_level(tmp_path, template)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(model), eos_token="</s>")
    ours = Tokenizer.load(model)
    texts = ["one", "", " zwölf\n"]
    documents = ours.encode_documents(texts, ours.begin_of_document("auto"))
    for text, document in zip(texts, documents):
        assert document.tolist() == [*(i for i in theirs(text).input_ids if i != EOS), EOS]


def test_a_begin_that_is_the_end_is_refused(tmp_path):
    model = byte_level(tmp_path, "</s> $A")
    for prepend in ("auto", "on"):
        with pytest.raises(DataError, match=rf"id {EOS}.*--prepend-bos off, or --eod-token"):
            Tokenizer.load(model).begin_of_document(prepend)
    assert Tokenizer.load(model).begin_of_document("off") == ()
    assert Tokenizer.load(model, "<s>").begin_of_document("auto") == (EOS,)


def test_a_begin_that_the_vocabulary_lacks_is_refused(tmp_path):
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
def test_a_configuration_of_other_types_is_refused(tmp_path, config):
    with pytest.raises(
        DataError, match=r"tokenizer_config\.json.*(bos_token|eos_token|object).*Mend it"
    ):
        Tokenizer.load(byte_level(tmp_path, "", config))


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text").mkdir()
    for name in ("a", "b"):
        (tmp_path / "text" / f"{name}.txt").write_text(f"{name} {TEXT}")
    return tmp_path / "text"


@pytest.mark.parametrize(("flags", "begin"), [([], [BOS]), (["--prepend-bos", "off"], [])])
def test_a_store_and_its_manifest_have_it(text, tmp_path, capsys, flags, begin):
    model = byte_level(tmp_path / "model", "<s> $A")
    prefix = tmp_path / "store" / "P"
    arguments = [
        "--input",
        str(text),
        "--output-prefix",
        str(prefix),
        "--tokenizer-model",
        str(model),
    ]
    assert prepare_data([*arguments, *flags]) == 0
    assert ("begin with ids [256]" in capsys.readouterr().out) == bool(begin)
    store, manifest, tokenizer = TokenStore(prefix), read_manifest(prefix), Tokenizer.load(model)
    assert manifest.begin_of_document == tuple(begin)
    for number, name in enumerate("ab"):
        document = store.document(number).tolist()
        assert document == [*begin, *tokenizer.encode(f"{name} {TEXT}"), EOS]
        assert tokenizer.decode(document) == f"{name} {TEXT}"
        assert tokenizer.bytes_per_token[document].sum() == len(f"{name} {TEXT}")
    assert manifest.tokens == sum(store.lengths)
    assert manifest.bytes == 2 * len(f"a {TEXT}")
    inspect_data([str(prefix), "--verify"])


def test_the_configuration_is_kept_beside_the_store_so_that_auto_is_the_same_there(text, tmp_path):
    config = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True}
    first = Tokenizer.load(byte_level(tmp_path / "model", "", config))
    prepare(gather([text]), tmp_path / "store" / "P", first)
    again = Tokenizer.load(tmp_path / "store" / "tokenizer.json")
    assert again.begin_of_document("auto") == (BOS,)


def test_both_ways_of_one_corpus_are_made_anew_and_not_blended(text, tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path / "model", "<s> $A"))
    corpus = gather([text])
    for name in ("auto", "off"):
        prepare(corpus, tmp_path / name / "P", tokenizer, prepend_bos=name)
    path = ("1", str(tmp_path / "auto" / "P"), "1", str(tmp_path / "off" / "P"))
    config = DataConfig(data_path=path, seq_length=8, split=(1.0, 0.0))
    with pytest.raises(DataError, match=r"cannot be blended.*\[256\].*\[\].*--prepend-bos"):
        Dataset.open(config, seed=1)
    # A store without a manifest does not say.
    manifest_path(tmp_path / "off" / "P").unlink()
    assert Dataset.open(config, seed=1).training.seq_length == 8


def test_a_shard_of_the_other_kind_is_not_taken(text, tmp_path, monkeypatch):
    tokenizer = Tokenizer.load(byte_level(tmp_path / "model", "<s> $A"))
    prefix = tmp_path / "P"
    monkeypatch.setattr("megatron_ring.data.prepare._join", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(gather([text]), prefix, tokenizer, prepend_bos="off")
    monkeypatch.undo()
    prepare(gather([text]), prefix, tokenizer)
    assert TokenStore(prefix).document(0)[0] == BOS


def test_a_document_without_the_begin_that_its_manifest_has_is_found(text, tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path / "model"))
    manifest = prepare(gather([text]), tmp_path / "P", tokenizer).manifest
    other = Manifest(**{**vars(manifest), "begin_of_document": (BOS,)})
    with pytest.raises(
        DataError, match=r"document 0 begins with ids \[64\], and its manifest has \[256\]"
    ):
        verify(TokenStore(tmp_path / "P"), other, tokenizer)


@pytest.mark.parametrize(
    ("id", "fits"), [((1 << 22) - 1, True), (1 << 22, False), (1 << 30, False)]
)
def test_token_ids_have_a_limit(tmp_path, id, fits):
    model = byte_level(tmp_path)
    described = json.loads(model.read_text())
    described["model"]["vocab"]["far"] = id
    model.write_text(json.dumps(described))
    if fits:
        assert Tokenizer.load(model).vocab_size == id + 1
        assert Tokenizer.load(model).bytes_per_token[[64, id]].tolist() == [1, 3]
    else:
        with pytest.raises(DataError, match=rf"id {id} among its 259 tokens.*4194303"):
            Tokenizer.load(model)
