"""The families of models: for each what its config.json says, and which of its modules is which of ours."""

from dataclasses import dataclass

from megatron_ring.checkpoint.hugging_face import layer_windows
from megatron_ring.checkpoint.hugging_face.aspects import (
    Aspect,
    always,
    key,
    key_value_heads,
    linear_biases,
    only,
    size,
    tied,
    whole_heads,
    written,
)
from megatron_ring.checkpoint.hugging_face.modules import Module, conv1d, module
from megatron_ring.checkpoint.hugging_face.rope_parameters import ROPE


@dataclass(frozen=True)
class Family:
    """architecture: transformers' class. length: the key of the longest sequence. prefix: what its base model's tensors
    are named with, unless that was saved without a head. buffers: endings of tensors that hold nothing learned."""

    architecture: str
    aspects: tuple[Aspect, ...]
    modules: dict[str, Module]
    length: str = "max_position_embeddings"
    prefix: str = "model."
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)


_UNKNOWN = (
    only("quantization_config", None, because="quantised weights have no counterpart here"),
)

_LIKE_LLAMA = (
    size("hidden_size", "hidden_size"),
    size("intermediate_size", "ffn_hidden_size"),
    size("num_hidden_layers", "num_layers"),
    size("num_attention_heads", "num_attention_heads"),
    key("rms_norm_eps", "norm_epsilon", 1e-6),
    key("initializer_range", "init_method_std", 0.02),
    only("hidden_act", "silu", "swish", because="the gated feed-forward here is SwiGLU"),
    tied(False),
    ROPE,
    *_UNKNOWN,
)

_LLAMA_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "self_attn.o_proj": "attention.out_proj",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}

_LLAMA_MODULES = {
    "model.embed_tokens": module("embedding"),
    **{
        f"model.layers.{{}}.{theirs}": module(f"blocks.{{}}.{ours}")
        for theirs, ours in _LLAMA_LAYER.items()
    },
    "model.norm": module("final_norm"),
    "lm_head": module("output"),
}

_GPT2_LAYER = {
    "ln_1": module("blocks.{}.attention_norm"),
    "attn.c_attn": conv1d(*(f"blocks.{{}}.attention.{name}_proj" for name in "qkv")),
    "attn.c_proj": conv1d("blocks.{}.attention.out_proj"),
    "ln_2": module("blocks.{}.mlp_norm"),
    "mlp.c_fc": conv1d("blocks.{}.mlp.up_proj"),
    "mlp.c_proj": conv1d("blocks.{}.mlp.down_proj"),
}

_GPT2_MODULES = {
    "transformer.wte": module("embedding"),
    "transformer.wpe": module("position_embedding"),
    **{f"transformer.h.{{}}.{theirs}": ours for theirs, ours in _GPT2_LAYER.items()},
    "transformer.ln_f": module("final_norm"),
    "lm_head": module("output"),
}

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        (
            *_LIKE_LLAMA,
            key_value_heads(0),
            key("head_dim", "kv_channels", 0),
            whole_heads("hidden_size", "num_attention_heads"),
            linear_biases(),
        ),
        _LLAMA_MODULES,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        (
            *_LIKE_LLAMA,
            key_value_heads(8),
            key("head_dim", "kv_channels", 0),
            layer_windows.MISTRAL,
        ),
        _LLAMA_MODULES,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        (
            *_LIKE_LLAMA,
            key_value_heads(32),
            key("head_dim", "kv_channels", 0),
            always(add_qkv_bias=True),
            layer_windows.QWEN,
        ),
        _LLAMA_MODULES,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        (
            *_LIKE_LLAMA,
            key_value_heads(32),
            key("head_dim", "kv_channels", 128),
            always(qk_layernorm=True),
            only(
                "attention_bias",
                False,
                because="biases in attention alone, its output too, have no counterpart here",
            ),
            layer_windows.QWEN,
        ),
        _LLAMA_MODULES,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        (
            size("n_embd", "hidden_size"),
            size("n_layer", "num_layers"),
            size("n_head", "num_attention_heads"),
            key("n_inner", "ffn_hidden_size", 0),
            key("layer_norm_epsilon", "norm_epsilon", 1e-5),
            key("initializer_range", "init_method_std", 0.02),
            tied(True),
            always(
                normalization="LayerNorm",
                activation="gelu",
                add_bias_linear=True,
                position_embedding_type="learned_absolute",
            ),
            whole_heads("n_embd", "n_head"),
            written(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
            only(
                "activation_function",
                "gelu_new",
                "gelu_pytorch_tanh",
                because="gelu here is the tanh form",
            ),
            only("scale_attn_weights", True, because="scores are scaled by 1 / sqrt(D)"),
            only(
                "scale_attn_by_inverse_layer_idx",
                False,
                because="scores are scaled alike in every layer",
            ),
            only("add_cross_attention", False, because="there is no encoder"),
            *_UNKNOWN,
        ),
        _GPT2_MODULES,
        length="n_positions",
        prefix="transformer.",
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
}
