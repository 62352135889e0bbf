"""Long context on import: what RoPE becomes, that transformers computes the same with it, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_ring.checkpoint.hugging_face.exporting import ExportOptions, export_checkpoint
from megatron_ring.checkpoint.hugging_face.families import FAMILIES, read_model
from megatron_ring.checkpoint.hugging_face.importing import import_folder
from megatron_ring.checkpoint.hugging_face.stretch import Stretch
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.config import load_yaml
from megatron_ring.errors import ConfigError
from tests.checkpoint.hugging_face_models import (
    CASES,
    LENGTH,
    VOCABULARY,
    config,
    logits,
    our_logits,
    save,
)

LONG = 4 * LENGTH
ORIGINAL = "original_max_position_embeddings"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders of transformers' models: an unstretched one, stretched ones, and one with learned positions."""
    root = tmp_path_factory.mktemp("models")
    for name in ("qwen2", "gpt2", "llama 3", "llama by linear"):
        save(CASES[name], root / name)
    return root


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn", "llama3"])
def test_a_stretched_model_is_the_same_in_transformers(scaling, models, tmp_path):
    stretch = Stretch(rope_scaling=scaling, seq_length=LONG)
    ours = Summary.of(import_folder(models / "qwen2", tmp_path / "ours", stretch).path)
    model = ours.config.model
    assert (ours.config.data.seq_length, ours.state.seq_length) == (LONG, LONG)
    assert (model.rope_scaling, model.rope_scaling_factor) == (scaling, 4.0)
    assert model.rope_original_length == (LENGTH if scaling in ("yarn", "llama3") else 0)

    export_checkpoint(tmp_path / "ours", tmp_path / "back", ExportOptions())
    tokens_BS = torch.randint(VOCABULARY, (1, LONG), generator=torch.Generator().manual_seed(0))
    expected = logits(tmp_path / "back", tokens_BS)
    torch.testing.assert_close(our_logits(ours, tokens_BS), expected, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(expected, logits(models / "qwen2", tokens_BS), atol=1e-2)


def test_both_generations_of_transformers_find_their_keys(models, tmp_path):
    import_folder(
        models / "qwen2", tmp_path / "ours", Stretch(rope_scaling="yarn", seq_length=LONG)
    )
    export_checkpoint(tmp_path / "ours", tmp_path / "back", ExportOptions())
    told = json.loads((tmp_path / "back/config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LENGTH}
    assert told["rope_scaling"] == yarn
    assert told["rope_parameters"] == yarn | {"rope_theta": 10000.0}
    assert (told["rope_theta"], told["max_position_embeddings"]) == (10000.0, LONG)
    assert config(tmp_path / "back")["rope_parameters"] == told["rope_parameters"]


def test_the_factor_may_be_given_and_a_stretch_of_another_kind_be_replaced(models, tmp_path):
    """From the 16 tokens that the model was first trained on, not from the 48 that it is made for."""
    stretch = Stretch(rope_scaling="yarn", rope_scaling_factor=10.0)
    path = import_folder(models / "llama 3", tmp_path / "ours", stretch).path
    written = load_yaml(path / "config.yaml")
    assert written.data.seq_length == 160
    model = written.model
    assert (model.rope_scaling, model.rope_scaling_factor, model.rope_original_length) == (
        "yarn",
        10.0,
        16,
    )
    other = Summary.of(
        import_folder(models / "llama 3", tmp_path / "other", Stretch("ntk", seq_length=LONG)).path
    ).config
    assert (other.model.rope_scaling_factor, other.data.seq_length) == (LONG / 16, LONG)


def test_a_config_may_name_the_old_length_beside_its_stretch(models, tmp_path):
    """As Qwen's do, and transformers before 5 takes YaRN's factor from the lengths: ours names the new one."""
    told = json.loads((models / "qwen2/config.json").read_text())
    told["rope_parameters"] = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 1e4,
        ORIGINAL: LENGTH,
    }
    shutil.copytree(models / "qwen2", tmp_path / "theirs")
    (tmp_path / "theirs/config.json").write_text(json.dumps(told))
    path = import_folder(
        tmp_path / "theirs", tmp_path / "ours", Stretch(seq_length=2 * LENGTH)
    ).path
    assert load_yaml(path / "config.yaml").data.seq_length == 2 * LENGTH
    assert export_checkpoint(path, tmp_path / "back", ExportOptions()).longest == 4 * LENGTH
    assert config(tmp_path / "back")["max_position_embeddings"] == 4 * LENGTH


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ("yarn", 2.0, 64)),
        ({"rope_scaling": {"rope_type": "yarn", "factor": None, ORIGINAL: 16}}, ("yarn", 4.0, 16)),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, ORIGINAL: 16}, ORIGINAL: 32},
            ("yarn", 2.0, 32),
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1.0}}, ("none", 1.0, 0)),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"rope_type": "yarn"},
            },
            ("linear", 2.0, 0),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    ORIGINAL: 32,
                    "attn_factor": 0.9,
                }
            },
            ("yarn", 2.0, 32),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, ORIGINAL: 32, "finetuned": True}},
            ("yarn", 2.0, 32),
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 16, "truncate": False}},
            ("linear", 2.0, 0),
        ),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, ("none", 1.0, 0)),
        (
            {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            ("linear", 2.0, 0),
        ),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "default", ORIGINAL: None}},
            ("none", 1.0, 0),
        ),
    ],
)
def test_what_a_config_says_of_its_stretch(told, expected):
    """As transformers 5 has it, the words of older ones included."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers"), 4)
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    model, problems = read_model(FAMILIES["llama"], sizes | told)
    assert problems == []
    assert (model.rope_scaling, model.rope_scaling_factor, model.rope_original_length) == expected


def test_samples_may_be_shorter_than_the_model_is_made_for(models, tmp_path):
    config = Summary.of(
        import_folder(models / "qwen2", tmp_path / "ours", Stretch(seq_length=16)).path
    ).config
    assert (config.data.seq_length, config.model.rope_scaling) == (16, "none")


@pytest.mark.parametrize(
    ("name", "stretch", "reason"),
    [
        ("gpt2", Stretch("yarn", seq_length=LONG), "positions are a learned table of 48 rows"),
        ("gpt2", Stretch(seq_length=16), "its seq_length is 48. Leave out --seq-length"),
        (
            "qwen2",
            Stretch(seq_length=LONG),
            "seq_length 192 is longer than the 48 tokens that the model is made for",
        ),
        ("qwen2", Stretch("yarn"), "rope_scaling yarn to which length? Set --seq-length"),
        (
            "qwen2",
            Stretch("yarn", seq_length=LENGTH),
            "yarn by 1, from 48 tokens, must be by more than 1",
        ),
        (
            "qwen2",
            Stretch("yarn", rope_scaling_factor=0.5),
            "yarn by 0.5, from 48 tokens, must be by more than 1",
        ),
        (
            "qwen2",
            Stretch(rope_scaling_factor=4.0),
            "rope_scaling_factor has no effect without a stretch",
        ),
        ("qwen2", Stretch(seq_length=-1), "must not be below 0"),
        ("llama by linear", Stretch("yarn", seq_length=LONG), "does not tell from which length"),
    ],
)
def test_stretches_that_cannot_be(name, stretch, reason, models, tmp_path):
    with pytest.raises(ConfigError) as refused:
        import_folder(models / name, tmp_path / "ours", stretch)
    assert reason in str(refused.value)
    assert not (tmp_path / "ours").exists()
