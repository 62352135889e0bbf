"""The config.json of published models is read in full, with their known number of parameters."""

from math import prod

import pytest

from megatron_ring.checkpoint.hugging_face.families import FAMILIES, read_model
from megatron_ring.model.shapes import parameter_shapes

# Including keys that have no effect here, except lists and names.
LLAMA_3_1_8B = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
MISTRAL_7B_V0_1 = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN_2_5_0_5B = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3_0_6B = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GPT_2 = {
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_type": "cls_index",
    "vocab_size": 50257,
}


@pytest.mark.parametrize(
    ("config", "count", "fields"),
    [
        (
            LLAMA_3_1_8B,
            8_030_261_248,
            {
                "rope_scaling": "llama3",
                "rope_original_length": 8192,
                "rotary_base": 500000.0,
                "num_query_groups": 8,
            },
        ),
        (MISTRAL_7B_V0_1, 7_241_732_096, {"window_size": 4096, "norm_epsilon": 1e-5}),
        (QWEN_2_5_0_5B, 494_032_768, {"window_size": 0, "add_qkv_bias": True, "rotary_base": 1e6}),
        (
            QWEN_3_0_6B,
            596_049_920,
            {"kv_channels": 128, "qk_layernorm": True, "norm_epsilon": 1e-6},
        ),
        (GPT_2, 124_439_808, {"activation": "gelu", "untie_embeddings_and_output_weights": False}),
    ],
    ids=["Llama 3.1 8B", "Mistral 7B", "Qwen 2.5 0.5B", "Qwen 3 0.6B", "GPT-2"],
)
def test_published_configs_are_read_with_the_known_number_of_parameters(config, count, fields):
    family = FAMILIES[config["model_type"]]
    model, problems = read_model(family, config)
    assert problems == []
    assert {name: getattr(model, name) for name in fields} == fields
    shapes = parameter_shapes(model, config["vocab_size"], config[family.length])
    assert sum(map(prod, shapes.values())) == count
