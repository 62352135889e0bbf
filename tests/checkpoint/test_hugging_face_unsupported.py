"""For unsupported families, the missing features and the nearest family are found."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_ring.checkpoint.hugging_face import unsupported
from megatron_ring.checkpoint.hugging_face.families import FAMILIES
from megatron_ring.checkpoint.hugging_face.unsupported import describe, nearest_and_missing


@pytest.mark.parametrize("name", unsupported._KNOWN)
def test_the_table_has_only_unsupported_families_each_with_a_supported_nearest_one(name):
    nearest, missing = nearest_and_missing({"model_type": name})
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
def test_the_features_of_an_unknown_family_are_found_by_its_keys(name, changes, nearest, features):
    """In the configs of the installed transformers."""
    config = CONFIG_MAPPING[name]().to_dict() | changes | {"model_type": "unheard-of"}
    nearest_by_keys, missing = nearest_and_missing(config)
    assert nearest_by_keys == nearest
    assert set(missing) == set(features)


def test_features_from_the_table_and_from_the_keys_are_combined():
    config = {
        "model_type": "phi3",
        "rope_scaling": {"type": "longrope"},
        "quantization_config": {"bits": 4},
    }
    assert nearest_and_missing(config) == (
        "llama",
        [unsupported.FUSED, unsupported.QUANTISED, unsupported.LONGROPE],
    )
    assert (
        unsupported.EXACT_GELU
        not in nearest_and_missing({"model_type": "gemma", "hidden_act": "gelu"})[1]
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": None},
        {"model_type": ["x"], "rope_scaling": [1], "layer_types": 3, "head_dim": "x"},
    ],
)
def test_values_of_any_type_are_described(config):
    assert "Supported: llama" in describe(config)
