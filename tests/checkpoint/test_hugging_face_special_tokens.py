"""An export finds the ids of special tokens in the right source, and transformers reads them."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import transformers

from megatron_ring.checkpoint.hugging_face.exporting import ExportOptions, export_checkpoint
from megatron_ring.config import ModelConfig
from megatron_ring.errors import CheckpointError
from tests.checkpoint.constant_weights import VOCABULARY, write

MODEL = ModelConfig(num_layers=1, hidden_size=32, num_attention_heads=4)


def tokenizer(folder: Path, **files: dict) -> Path:
    """Write a folder of JSON files, given by their names without the suffix."""
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def added(**ids: int) -> dict:
    return {
        "added_tokens": [{"id": number, "content": f"<{name}>"} for name, number in ids.items()]
    }


def exported(tmp_path: Path, folder: Path | None, end_of_document: int | None = None) -> Path:
    write(tmp_path / "ours", MODEL, end_of_document=end_of_document)
    export_checkpoint(tmp_path / "ours", tmp_path / "theirs", ExportOptions(tokenizer=folder))
    return tmp_path / "theirs"


def ends(folder: Path) -> tuple:
    """Return bos and eos of the model's config, and eos of the generation config."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    generation = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return config.bos_token_id, config.eos_token_id, generation.eos_token_id


def test_without_a_tokenizer_the_end_is_that_of_the_training_data(tmp_path):
    assert ends(exported(tmp_path, None, end_of_document=7)) == (None, 7, 7)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {
                "config": {"bos_token_id": 1, "eos_token_id": [2, 3]},
                "generation_config": {"eos_token_id": 4},
            },
            (1, [2, 3], 4),
        ),
        ({"config": {"bos_token_id": 1}, "generation_config": {"eos_token_id": 4}}, (1, 4, 4)),
        ({"config": {"eos_token_id": 2}, "generation_config": {"temperature": 0.5}}, (None, 2, 2)),
        (
            {
                "tokenizer": added(a=1, z=2),
                "tokenizer_config": {"eos_token": "<z>", "bos_token": "<a>"},
            },
            (1, 2, 2),
        ),
        (
            {"tokenizer": added(z=2), "special_tokens_map": {"eos_token": {"content": "<z>"}}},
            (None, 2, 2),
        ),
        ({"tokenizer": added(z=2), "tokenizer_config": {"eos_token": "<y>"}}, (None, 7, 7)),
        ({"tokenizer": {}, "tokenizer_config": {"eos_token": None}}, (None, 7, 7)),
    ],
)
def test_the_folder_of_the_tokenizer_takes_precedence(files, expected, tmp_path):
    folder = tokenizer(tmp_path / "tokenizer", **{"tokenizer": {}, **files})
    assert ends(exported(tmp_path, folder, end_of_document=7)) == expected


def test_other_keys_of_the_generation_config_are_kept(tmp_path):
    files = {"tokenizer": {}, "generation_config": {"temperature": 0.5, "do_sample": True}}
    out = exported(tmp_path, tokenizer(tmp_path / "tokenizer", **files), end_of_document=7)
    written = json.loads((out / "generation_config.json").read_text())
    assert written == files["generation_config"] | {"eos_token_id": 7}


def test_the_ids_of_a_sentencepiece_model_are_found(tmp_path):
    model = io.BytesIO()
    texts = (f"some {word} words" for word in ("more", "other", "such"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=model,
        vocab_size=16,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    assert ends(exported(tmp_path, folder)) == (1, 2, 2)


@pytest.mark.parametrize(
    "files",
    [
        {"config": {"eos_token_id": "2"}},
        {"config": {"eos_token_id": True}},
        {"config": {"eos_token_id": [2, -1]}},
        {"config": {"eos_token_id": VOCABULARY}},
        {"tokenizer": added(z=VOCABULARY), "tokenizer_config": {"eos_token": "<z>"}},
        {
            "tokenizer": {"added_tokens": [{"content": "<z>", "id": "x"}]},
            "tokenizer_config": {"eos_token": "<z>"},
        },
    ],
)
def test_an_invalid_id_is_refused(files, tmp_path):
    folder = tokenizer(tmp_path / "tokenizer", **{"tokenizer": {}, **files})
    with pytest.raises(CheckpointError, match="eos_token_id"):
        exported(tmp_path, folder)
    assert not (tmp_path / "theirs").exists()


def test_a_folder_without_any_id_leaves_eos_token_id_unset(tmp_path):
    out = exported(tmp_path, tokenizer(tmp_path / "tokenizer", tokenizer={}))
    assert json.loads((out / "config.json").read_text())["eos_token_id"] is None
    assert not (out / "generation_config.json").exists()
