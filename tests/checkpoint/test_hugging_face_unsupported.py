"""Families that are not read: what is named as missing, and which family is nearest, from the table and from keys."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_ring.checkpoint.hugging_face import unsupported
from megatron_ring.checkpoint.hugging_face.families import FAMILIES
from megatron_ring.checkpoint.hugging_face.unsupported import described, reasons


@pytest.mark.parametrize("name", unsupported._KNOWN)
def test_the_table_names_a_supported_family_and_no_supported_one_is_in_it(name):
    nearest, missing = reasons({"model_type": name})
    assert nearest in FAMILIES
    assert missing
    assert name not in FAMILIES


@pytest.mark.parametrize(
    ("name", "changes", "nearest", "features"),
    [
        ("mixtral", {}, "llama", [unsupported.EXPERTS]),
        ("mixtral", {"sliding_window": 4096}, "mistral", [unsupported.EXPERTS]),
        ("deepseek_v3", {}, "llama", [unsupported.EXPERTS, unsupported.LATENT]),
        ("gemma2", {}, "mistral", [unsupported.SOFT_CAP, unsupported.MULTIPLIERS]),
        (
            "gpt_neox",
            {},
            "gpt2",
            [unsupported.PARALLEL, unsupported.PARTIAL, unsupported.EXACT_GELU],
        ),
        ("gptj", {}, "gpt2", [unsupported.PARTIAL]),
        ("phi", {}, "gpt2", [unsupported.PARTIAL]),
        ("falcon", {"alibi": True}, "gpt2", [unsupported.ALIBI, unsupported.PARALLEL]),
        ("mpt", {}, "gpt2", [unsupported.ALIBI]),
        ("jamba", {}, "llama", [unsupported.EXPERTS, unsupported.RECURRENT]),
        ("granite", {}, "llama", [unsupported.MULTIPLIERS]),
        (
            "llama4_text",
            {},
            "qwen3",
            [unsupported.EXPERTS, unsupported.CHUNKED, unsupported.NO_ROPE],
        ),
        ("qwen2_5_vl", {}, "llama", [unsupported.INPUTS]),
        ("t5", {}, "gpt2", [unsupported.ENCODER]),
        ("nemotron", {}, "llama", [unsupported.SQUARED_RELU, unsupported.PARTIAL]),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "llama", [unsupported.LONGROPE]),
        ("llama", {"quantization_config": {"bits": 4}}, "llama", [unsupported.QUANTISED]),
        ("qwen2_moe", {"qkv_bias": True}, "qwen2", [unsupported.EXPERTS]),
        ("llama", {}, "llama", []),
    ],
)
def test_the_features_of_a_family_of_an_unknown_name(name, changes, nearest, features):
    """From the keys alone, of the configs that the installed transformers has."""
    config = CONFIG_MAPPING[name]().to_dict() | changes | {"model_type": "unheard-of"}
    found, missing = reasons(config)
    assert (found, set(missing)) == (nearest, set(features))


def test_what_the_table_says_and_what_the_keys_say_is_one_list():
    config = {
        "model_type": "phi3",
        "rope_scaling": {"type": "longrope"},
        "quantization_config": {"bits": 4},
    }
    assert reasons(config) == (
        "llama",
        [unsupported.FUSED, unsupported.QUANTISED, unsupported.LONGROPE],
    )
    assert unsupported.EXACT_GELU not in reasons({"model_type": "gemma", "hidden_act": "gelu"})[1]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": None},
        {"model_type": ["x"], "rope_scaling": [1], "layer_types": 3, "head_dim": "x"},
    ],
)
def test_values_of_any_type_are_described(config):
    assert "Known: llama" in described(config)
