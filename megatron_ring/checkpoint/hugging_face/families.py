"""The supported families of transformers' models, and the conversion of their configs.

Each family has a list of key mappings for its config.json and a table of its modules. A family can
express a ModelConfig if the config written for it reads back as the same model.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_ring.checkpoint.hugging_face.key_mappings import (
    MISTRAL_WINDOW,
    QWEN_WINDOWS,
    Fields,
    KeyMapping,
    divisible,
    export_only,
    implied,
    key_value_heads,
    linear_biases,
    number,
    required,
    size,
    tied_embeddings,
)
from megatron_ring.checkpoint.hugging_face.rope_parameters import ROPE
from megatron_ring.checkpoint.hugging_face.tensor_mapping import Module, conv1d, module
from megatron_ring.config import Config, ModelConfig
from megatron_ring.errors import CheckpointError
from megatron_ring.untrusted import shown


@dataclass(frozen=True)
class Family:
    """A family of models.

    architecture: the class in transformers. length: the key of the longest sequence. prefix: of the
    names of the base model's tensors, unless the model was saved without a head. buffers: name
    endings of tensors that are not parameters.
    """

    architecture: str
    mappings: tuple[KeyMapping, ...]
    modules: dict[str, Module]
    length: str = "max_position_embeddings"
    prefix: str = "model."
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)


_COMMON = (required("quantization_config", None, because="quantised weights are not supported"),)

_LIKE_LLAMA = (
    size("hidden_size", "hidden_size"),
    size("intermediate_size", "ffn_hidden_size"),
    size("num_hidden_layers", "num_layers"),
    size("num_attention_heads", "num_attention_heads"),
    number("rms_norm_eps", "norm_epsilon", 1e-6),
    number("initializer_range", "init_method_std", 0.02),
    required("hidden_act", "silu", "swish", because="the gated feed-forward here is SwiGLU"),
    tied_embeddings(False),
    ROPE,
    *_COMMON,
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
            number("head_dim", "kv_channels", 0),
            divisible("hidden_size", "num_attention_heads"),
            linear_biases(),
        ),
        _LLAMA_MODULES,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        (
            *_LIKE_LLAMA,
            key_value_heads(8),
            number("head_dim", "kv_channels", 0),
            MISTRAL_WINDOW,
        ),
        _LLAMA_MODULES,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        (
            *_LIKE_LLAMA,
            key_value_heads(32),
            number("head_dim", "kv_channels", 0),
            implied(add_qkv_bias=True),
            QWEN_WINDOWS,
        ),
        _LLAMA_MODULES,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        (
            *_LIKE_LLAMA,
            key_value_heads(32),
            number("head_dim", "kv_channels", 128),
            implied(qk_layernorm=True),
            required(
                "attention_bias",
                False,
                because="biases in attention only, including its output, are not supported",
            ),
            QWEN_WINDOWS,
        ),
        _LLAMA_MODULES,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        (
            size("n_embd", "hidden_size"),
            size("n_layer", "num_layers"),
            size("n_head", "num_attention_heads"),
            number("n_inner", "ffn_hidden_size", 0),
            number("layer_norm_epsilon", "norm_epsilon", 1e-5),
            number("initializer_range", "init_method_std", 0.02),
            tied_embeddings(True),
            implied(
                normalization="LayerNorm",
                activation="gelu",
                add_bias_linear=True,
                position_embedding_type="learned_absolute",
            ),
            divisible("n_embd", "n_head"),
            export_only(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
            required(
                "activation_function",
                "gelu_new",
                "gelu_pytorch_tanh",
                because="gelu here is the tanh approximation",
            ),
            required("scale_attn_weights", True, because="scores are scaled by 1 / sqrt(D)"),
            required(
                "scale_attn_by_inverse_layer_idx",
                False,
                because="scores have the same scale in every layer",
            ),
            required("add_cross_attention", False, because="there is no encoder"),
            *_COMMON,
        ),
        _GPT2_MODULES,
        length="n_positions",
        prefix="transformer.",
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
}


def read_model(family: Family, config: Fields) -> tuple[ModelConfig, list[str]]:
    """Return the model that a config.json describes, and everything in it that is not supported."""
    fields: Fields = {}
    problems: list[str] = []
    try:
        for mapping in family.mappings:
            fields |= mapping.read(config, problems)
        model = ModelConfig(**fields)
        return model, problems or Config(model=model).problems()
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        problems.append(f"a value has a type that is invalid for its key ({shown(error)}).")
        return ModelConfig(), problems


def write_model(family: Family, model: ModelConfig, seq_length: int) -> Fields:
    """Return the config.json of a model that was trained on samples of ``seq_length``.

    The family must be able to express the model.
    """
    model = resolved(model, seq_length)
    config: Fields = {family.length: _longest_sequence(model, seq_length)}
    for mapping in family.mappings:
        config |= mapping.write(model)
    return config


def unsupported_by_family(family: Family, model: ModelConfig, seq_length: int) -> list[str]:
    """Return the properties of ``model`` that the family cannot express; none if it can."""
    read_back, problems = read_model(family, write_model(family, model, seq_length))
    wanted = _comparable_fields(resolved(model, seq_length))
    expressed = _comparable_fields(resolved(read_back, seq_length))
    return problems + [
        f"{name} is {wanted[name]}, and can only be {expressed[name]}."
        for name in wanted
        if name in expressed and wanted[name] != expressed[name]
    ]


def choose_family(
    name: str, model: ModelConfig, seq_length: int, imported_from: str = ""
) -> tuple[str, str]:
    """Return the family to write ``model`` as, and the reason for the choice.

    It is ``name`` if given, else ``imported_from`` if that can express the model exactly, else the
    first family that can. Raises CheckpointError with the reasons if the requested family, or
    without one every family, cannot.
    """
    problems = {
        family: unsupported_by_family(FAMILIES[family], model, seq_length)
        for family in ([name] if name else FAMILIES)
    }
    capable = [family for family in problems if not problems[family]]
    if not capable:
        reasons = [f"as {family}: {reason}" for family in problems for reason in problems[family]]
        raise CheckpointError(["no Hugging Face family describes the model exactly:", *reasons])
    if name:
        return name, "set by --family"
    if imported_from in capable:
        return imported_from, "from which it was imported"
    if len(capable) == 1:
        return capable[0], "the only family that describes it exactly"
    return capable[0], (
        f"the first of those that describe it exactly: {', '.join(capable)}; "
        "set --family for another"
    )


def resolved(model: ModelConfig, seq_length: int) -> ModelConfig:
    """Return the same model with every default replaced by its value."""
    model = replace(
        model,
        ffn_hidden_size=model.feed_forward_size,
        num_query_groups=model.key_value_heads,
        kv_channels=model.head_dim,
    )
    if model.rope_scaling == "ntk":
        return _with_ntk_base(model)
    if model.rope_scaling in ("yarn", "llama3") and not model.rope_original_length:
        return replace(model, rope_original_length=_original_length(model, seq_length))
    return model


def _with_ntk_base(model: ModelConfig) -> ModelConfig:
    """Return an NTK-aware model as plain RoPE with base * factor^(D / (D-2)).

    A head of two elements has no such base.
    """
    exponent = model.head_dim / max(model.head_dim - 2, 1)
    base = model.rotary_base * model.rope_scaling_factor**exponent
    return replace(model, rotary_base=base, rope_scaling="none", rope_scaling_factor=1.0)


def _longest_sequence(model: ModelConfig, seq_length: int) -> int:
    """Return the trained length, or the extended length with YaRN.

    transformers before 5 computes YaRN's factor from it.
    """
    if model.rope_scaling != "yarn":
        return seq_length
    return round(model.rope_original_length * model.rope_scaling_factor)


def _original_length(model: ModelConfig, seq_length: int) -> int:
    length = seq_length / model.rope_scaling_factor
    if not length.is_integer():
        raise CheckpointError(
            f"the original length of RoPE would be {length} tokens (seq_length {seq_length} / "
            f"rope_scaling_factor {model.rope_scaling_factor}), and config.json needs a whole "
            "number."
        )
    return int(length)


def _comparable_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields that change what the model computes.

    The base of RoPE is left out without RoPE, windows are compared layer by layer, and the
    vocabulary padding is left out.
    """
    windows = [model.window_of(layer) for layer in range(model.num_layers)]
    fields = asdict(model) | {"window by layer": windows}
    for name in ("window_size", "window_attn_skip_freq", "padded_vocab_size"):
        del fields[name]
    if model.position_embedding_type != "rope":
        del fields["rotary_base"]
    return fields
