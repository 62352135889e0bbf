"""Context extension on import: the RoPE scaling, equal logits in transformers, invalid options."""

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
    """Save transformers models without RoPE scaling, with it, and with learned positions."""
    root = tmp_path_factory.mktemp("models")
    for name in ("qwen2", "gpt2", "llama 3", "llama by linear"):
        save(CASES[name], root / name)
    return root


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn", "llama3"])
def test_a_scaled_model_has_the_same_logits_in_transformers(scaling, models, tmp_path):
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


def test_the_config_has_the_keys_of_old_and_new_transformers(models, tmp_path):
    import_folder(
        models / "qwen2", tmp_path / "ours", Stretch(rope_scaling="yarn", seq_length=LONG)
    )
    export_checkpoint(tmp_path / "ours", tmp_path / "back", ExportOptions())
    written = json.loads((tmp_path / "back/config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LENGTH}
    assert written["rope_scaling"] == yarn
    assert written["rope_parameters"] == yarn | {"rope_theta": 10000.0}
    assert (written["rope_theta"], written["max_position_embeddings"]) == (10000.0, LONG)
    assert config(tmp_path / "back")["rope_parameters"] == written["rope_parameters"]


def test_the_factor_may_be_given_and_other_scaling_be_replaced(models, tmp_path):
    """The factor applies to the model's original length of 16, not to its extended one of 48."""
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


def test_a_config_may_have_the_original_length_as_the_longest(models, tmp_path):
    """Like Qwen's. An export writes the extended length, which transformers 4 needs for YaRN."""
    theirs = json.loads((models / "qwen2/config.json").read_text())
    theirs["rope_parameters"] = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 1e4,
        ORIGINAL: LENGTH,
    }
    shutil.copytree(models / "qwen2", tmp_path / "theirs")
    (tmp_path / "theirs/config.json").write_text(json.dumps(theirs))
    path = import_folder(
        tmp_path / "theirs", tmp_path / "ours", Stretch(seq_length=2 * LENGTH)
    ).path
    assert load_yaml(path / "config.yaml").data.seq_length == 2 * LENGTH
    assert export_checkpoint(path, tmp_path / "back", ExportOptions()).longest == 4 * LENGTH
    assert config(tmp_path / "back")["max_position_embeddings"] == 4 * LENGTH


@pytest.mark.parametrize(
    ("keys", "expected"),
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
def test_rope_scaling_is_read_in_all_variants(keys, expected):
    """As transformers 5 reads it, including the keys of older versions."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers"), 4)
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    model, problems = read_model(FAMILIES["llama"], sizes | keys)
    assert problems == []
    assert (model.rope_scaling, model.rope_scaling_factor, model.rope_original_length) == expected


def test_samples_may_be_shorter_than_the_longest_sequence(models, tmp_path):
    config = Summary.of(
        import_folder(models / "qwen2", tmp_path / "ours", Stretch(seq_length=16)).path
    ).config
    assert (config.data.seq_length, config.model.rope_scaling) == (16, "none")


@pytest.mark.parametrize(
    ("name", "stretch", "parts"),
    [
        ("gpt2", Stretch("yarn", seq_length=LONG), ("48 rows", "--rope-scaling")),
        ("gpt2", Stretch(seq_length=16), ("48 rows", "seq_length is 48", "--seq-length")),
        (
            "qwen2",
            Stretch(seq_length=LONG),
            ("seq_length 192", "48 tokens", "--rope-scaling"),
        ),
        (
            "qwen2",
            Stretch("yarn"),
            ("yarn needs a length", "--seq-length", "--rope-scaling-factor"),
        ),
        (
            "qwen2",
            Stretch("yarn", seq_length=LENGTH),
            ("yarn by 1,", "48 tokens", "more than 1", "--seq-length"),
        ),
        (
            "qwen2",
            Stretch("yarn", rope_scaling_factor=0.5),
            ("yarn by 0.5,", "48 tokens", "more than 1", "--rope-scaling-factor"),
        ),
        (
            "qwen2",
            Stretch(rope_scaling_factor=4.0),
            ("rope_scaling_factor has no effect", "--rope-scaling,"),
        ),
        ("qwen2", Stretch(seq_length=-1), ("below 0", "--seq-length")),
        (
            "llama by linear",
            Stretch("yarn", seq_length=LONG),
            ("linear", "--rope-scaling"),
        ),
    ],
)
def test_invalid_options_are_refused_with_numbers_and_flags(name, stretch, parts, models, tmp_path):
    with pytest.raises(ConfigError) as refused:
        import_folder(models / name, tmp_path / "ours", stretch)
    for part in parts:
        assert part in str(refused.value)
    assert not (tmp_path / "ours").exists()
