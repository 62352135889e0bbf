"""The families of models: for each what its config.json says, and which of its modules is which of ours."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_ring.checkpoint.hugging_face import key_mappings
from megatron_ring.checkpoint.hugging_face.key_mappings import (
    Aspect,
    Fields,
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
from megatron_ring.checkpoint.hugging_face.rope_parameters import ROPE
from megatron_ring.checkpoint.hugging_face.tensor_mapping import Module, conv1d, module
from megatron_ring.config import Config, ModelConfig
from megatron_ring.errors import CheckpointError
from megatron_ring.untrusted import shown


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
            key_mappings.MISTRAL,
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
            key_mappings.QWEN,
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
            key_mappings.QWEN,
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


def read_model(family: Family, config: Fields) -> tuple[ModelConfig, list[str]]:
    """What ``config`` describes, and everything in it that has no counterpart here."""
    fields: Fields = {}
    problems: list[str] = []
    try:
        for aspect in family.aspects:
            fields |= aspect.read(config, problems)
        model = ModelConfig(**fields)
        return model, problems or Config(model=model).problems()
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        return ModelConfig(), [
            *problems,
            f"a value is of a type that its key never has ({shown(error)}).",
        ]


def write_model(family: Family, model: ModelConfig, seq_length: int) -> Fields:
    """The config.json of a model that the family can express and that was trained on samples of ``seq_length``."""
    model = resolved(model, seq_length)
    config: Fields = {family.length: _longest(model, seq_length)}
    for aspect in family.aspects:
        config |= aspect.write(model)
    return config


def unsupported_by_family(family: Family, model: ModelConfig, seq_length: int) -> list[str]:
    """What there is in ``model`` that the family has not; nothing if it has all of it."""
    back, problems = read_model(family, write_model(family, model, seq_length))
    wanted, found = _compared(resolved(model, seq_length)), _compared(resolved(back, seq_length))
    return problems + [
        f"{name} is {wanted[name]}, and can only be {found[name]}."
        for name in wanted
        if name in found and wanted[name] != found[name]
    ]


def choose_family(
    name: str, model: ModelConfig, seq_length: int, imported_from: str = ""
) -> tuple[str, str]:
    """The family to write ``model`` as, and why: ``name``, else ``imported_from``, else the first that is able.

    Able is a family whose words describe the model exactly, so that it computes the same in each of them. Raises
    CheckpointError with the reasons where the one asked for, or without one every one, is not.
    """
    reasons = {
        each: unsupported_by_family(FAMILIES[each], model, seq_length)
        for each in ([name] if name else FAMILIES)
    }
    able = [each for each, problems in reasons.items() if not problems]
    if not able:
        listed = [
            f"as {each}: {problem}" for each, problems in reasons.items() for problem in problems
        ]
        raise CheckpointError(
            ["the model cannot be said exactly in Hugging Face's words:", *listed]
        )
    if name:
        return name, "as --family asks"
    if imported_from in able:
        return imported_from, "from which it was imported"
    if len(able) == 1:
        return able[0], "the only family that describes it exactly"
    return able[
        0
    ], f"the first of those that describe it exactly: {', '.join(able)}; --family takes another"


def resolved(model: ModelConfig, seq_length: int) -> ModelConfig:
    """The same model with every default and every derived number in its place."""
    model = replace(
        model,
        ffn_hidden_size=model.feed_forward_size,
        num_query_groups=model.key_value_heads,
        kv_channels=model.head_dim,
    )
    if model.rope_scaling == "ntk":
        return _with_base_of_ntk(model)
    if model.rope_scaling in ("yarn", "llama3") and not model.rope_original_length:
        return replace(model, rope_original_length=_original_length(model, seq_length))
    return model


def _with_base_of_ntk(model: ModelConfig) -> ModelConfig:
    """NTK-aware RoPE is RoPE of another base, base * factor^(D / (D-2)); a lone pair of a head has no base."""
    exponent = model.head_dim / max(model.head_dim - 2, 1)
    base = model.rotary_base * model.rope_scaling_factor**exponent
    return replace(model, rotary_base=base, rope_scaling="none", rope_scaling_factor=1.0)


def _longest(model: ModelConfig, seq_length: int) -> int:
    """What it was trained on; with YaRN what it is stretched to, from which transformers before 5 has the factor."""
    if model.rope_scaling != "yarn":
        return seq_length
    return round(model.rope_original_length * model.rope_scaling_factor)


def _original_length(model: ModelConfig, seq_length: int) -> int:
    length = seq_length / model.rope_scaling_factor
    if not length.is_integer():
        raise CheckpointError(
            f"RoPE was stretched from {length} tokens, seq_length {seq_length} / rope_scaling_factor "
            f"{model.rope_scaling_factor}, and config.json takes whole ones."
        )
    return int(length)


def _compared(model: ModelConfig) -> dict[str, Any]:
    """What makes a difference: RoPE's base where there is RoPE, windows layer by layer; rows are what they are."""
    fields = asdict(model) | {
        "window by layer": [model.window_of(layer) for layer in range(model.num_layers)]
    }
    without = {"window_size", "window_attn_skip_freq", "padded_vocab_size"}
    without |= set() if model.position_embedding_type == "rope" else {"rotary_base"}
    return {name: value for name, value in fields.items() if name not in without}
