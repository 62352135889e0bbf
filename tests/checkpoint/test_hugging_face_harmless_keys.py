"""Key variants and ignored keys of published configs are read as transformers reads them."""

import copy
import sys

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from megatron_ring.checkpoint.hugging_face.families import FAMILIES, read_model
from megatron_ring.checkpoint.hugging_face.importing import import_folder
from megatron_ring.checkpoint.hugging_face.stretch import Stretch
from megatron_ring.kernels.rope import Rope
from tests.checkpoint.hugging_face_models import Case, save

SIZES = {
    "vocab_size": 61,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "head_dim": 64,
}
ORIGINAL = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 1024}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}


def scaling(**parameters) -> dict:
    return {"rope_scaling": parameters}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", scaling(**YARN, attn_factor=0.8782488562869419)),  # DeepSeek-R1-0528-Qwen3-8B
        (
            "llama",
            scaling(type="yarn", factor=4.0, finetuned=True, **{ORIGINAL: 1024}),
        ),  # Yarn-Llama-2-7b-64k
        ("mistral", scaling(type="yarn", factor=4.0, finetuned=True, **{ORIGINAL: 1024})),
        ("llama", scaling(**YARN, mscale=1.0)),
        ("llama", scaling(**YARN, mscale=1.0, mscale_all_dim=0)),
        ("llama", scaling(**YARN, beta_fast=None, beta_slow=None, attention_factor=None)),
        ("llama", scaling(**YARN, beta_fast=32.0, beta_slow=1.0, truncate=True)),
        (
            "llama",
            scaling(rope_type="yarn", factor=4.0),
        ),  # the original length is max_position_embeddings
        ("llama", scaling(**YARN) | {ORIGINAL: 2048}),  # takes precedence outside rope_scaling
        ("llama", scaling(**LLAMA3) | {ORIGINAL: 2048}),
        ("llama", scaling(**LLAMA3, **{ORIGINAL: 512}, type="llama3")),
        ("llama", scaling(type="linear", factor=2)),
        ("llama", scaling(type="yarn", rope_type="linear", factor=2.0)),
        ("llama", scaling(rope_type="linear", factor=2.0, beta_fast=16, truncate=False)),
        ("llama", scaling()),
        ("llama", {"rope_scaling": None}),
        ("llama", scaling(type="default")),
        ("llama", scaling(rope_type="default", factor=4.0)),
        ("qwen2", scaling(type="default", mrope_section=[8, 12, 12])),
        ("llama", {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}),
        ("llama", scaling(type="linear", factor=2.0, rope_theta=5e5) | {"rope_theta": 1e6}),
        ("llama", scaling(type="linear", factor=2.0) | {"rope_parameters": {"rope_theta": 5e5}}),
        ("llama", {"rope_theta": 500000}),
        ("llama", {"head_dim": None}),
        ("mistral", {"head_dim": None, "sliding_window": None}),
        ("llama", {"num_key_value_heads": None}),
        ("qwen2", {"num_key_value_heads": None}),
        ("qwen3", {"num_key_value_heads": None}),
        (
            "llama",
            {
                "pretraining_tp": 2,
                "partial_rotary_factor": None,
                "torch_dtype": "bfloat16",
                "dtype": "float16",
            },
        ),
        ("llama", {"quantization_config": None, "auto_map": {"AutoModelForCausalLM": "x.Y"}}),
        ("llama", {"layer_types": ["full_attention"] * 2, "sliding_window": 16}),
        ("mistral", {"layer_types": ["full_attention"] * 2, "sliding_window": None}),
        (
            "qwen2",
            {
                "use_sliding_window": False,
                "sliding_window": 16,
                "max_window_layers": 0,
                "use_mrope": False,
            },
        ),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
        (
            "qwen3",
            {
                "layer_types": ["full_attention"] * 2,
                "use_sliding_window": True,
                "sliding_window": 16,
            },
        ),
    ],
)
def test_the_model_is_the_one_that_transformers_builds(family, changes):
    config = SIZES | changes
    their_config = CONFIG_MAPPING[family].from_dict(copy.deepcopy(config))
    with torch.device("meta"):
        attention = MODEL_MAPPING[type(their_config)](their_config).layers[0].self_attn
    # The class of the family's own module.
    rotary = next(
        value
        for name, value in vars(sys.modules[type(attention).__module__]).items()
        if name.endswith("RotaryEmbedding")
    )(their_config)

    model, problems = read_model(FAMILIES[family], config)
    assert problems == []
    rope = Rope(
        model.head_dim,
        model.rotary_base,
        model.rope_scaling,
        model.rope_scaling_factor,
        model.rope_original_length,
    )
    torch.testing.assert_close(rope.frequencies().float(), rotary.inv_freq, rtol=1e-5, atol=0)
    assert rope.magnitude == pytest.approx(rotary.attention_scaling)
    assert model.head_dim == attention.head_dim
    assert model.key_value_heads == attention.k_proj.out_features // attention.head_dim
    # The window is in Mistral's config, in each layer of Qwen, and nowhere in Llama.
    window = {"mistral": their_config, "llama": None}.get(family, attention)
    assert model.window_size == (getattr(window, "sliding_window", None) or 0)


def test_ignored_keys_are_noted(tmp_path):
    """Custom code is not run, as in transformers without trust_remote_code."""
    theirs = save(
        Case("llama", {"rope_scaling": {**YARN, "attn_factor": 0.9}, "auto_map": {"A": "x.Y"}}),
        tmp_path / "theirs",
    )
    notes = import_folder(theirs, tmp_path / "ours", Stretch()).notes
    for word in ("attn_factor", "auto_map", "LlamaForCausalLM"):
        assert word in " ".join(notes)
    theirs = save(Case("llama", {}), tmp_path / "plain")
    assert import_folder(theirs, tmp_path / "none", Stretch()).notes == []
