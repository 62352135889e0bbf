"""Explains why a family of transformers' models is unsupported: missing features, nearest family.

``_KNOWN`` lists published families by model_type, from the model code of transformers 5. Other
features, and all features of a model_type that is not listed, are recognised by the keys of
config.json.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from megatron_ring.checkpoint.hugging_face.families import FAMILIES
from megatron_ring.checkpoint.hugging_face.key_mappings import Fields
from megatron_ring.checkpoint.hugging_face.rope_parameters import rope_config

EXPERTS = "mixture of experts"
LATENT = "multi-head latent attention"
PARALLEL = "attention and feed-forward in parallel on one residual"
PARTIAL = "RoPE on part of a head"
INTERLEAVED = "interleaved RoPE: pairs (i, i + 1), not halves of a head"
ALIBI = "ALiBi position biases"
SOFT_CAP = "soft-capping by tanh"
RECURRENT = "recurrent or linear-attention layers"
ENCODER = "an encoder"
INPUTS = "images, audio or video as input"
FUSED = "fused projection tensors"
NO_ROPE = "layers without position embedding"
MULTIPLIERS = "multipliers on embedding, residual, scores or logits"
POST_NORM = "norms after attention and feed-forward"
WIDE_QK_NORM = "query and key norms over all heads together"
GEMMA_NORM = "RMSNorm that multiplies by 1 + weight"
GEGLU = "gated feed-forward with GELU (GeGLU)"
EMBEDDING_SCALE = "embedding multiplied by sqrt(hidden_size)"
RELU = "a feed-forward with ReLU"
SQUARED_RELU = "a feed-forward with squared ReLU"
EXACT_GELU = "exact GELU (erf), not the tanh approximation"
MULTI_QUERY = "multi-query attention with learned positions"
LOCAL_BASE = "a different RoPE base in layers with a window"
CLIP = "clipped queries, keys and values"
OUTPUT_GATE = "a gate on the attention output"
CHUNKED = "chunked attention"
LONGROPE = "longrope scaling of RoPE"
OUTPUT_BIAS = "a bias in the attention output projection and none in the feed-forward"
EMBEDDING_NORM = "a norm after the embedding"
PLAIN_NORM = "norms without weights"
QUANTISED = "quantised weights"

_GEMMA = (GEMMA_NORM, GEGLU, EMBEDDING_SCALE)
_DEEPSEEK = (LATENT, EXPERTS)


class _Family(NamedTuple):
    """An unsupported family.

    nearest: the supported family that shares most of the computation. missing: its features that
    are not supported.
    """

    nearest: str
    missing: tuple[str, ...]


_KNOWN = {
    "apertus": _Family("qwen3", ("the xIELU activation",)),
    "arcee": _Family("llama", (SQUARED_RELU,)),
    "arctic": _Family("mistral", (EXPERTS,)),
    "baichuan": _Family("llama", (FUSED, "ALiBi position biases in the 13B model")),
    "bamba": _Family("llama", (RECURRENT,)),
    "bert": _Family("gpt2", (ENCODER,)),
    "bitnet": _Family(
        "llama", (QUANTISED, SQUARED_RELU, "norms inside attention and feed-forward")
    ),
    "bloom": _Family("gpt2", (ALIBI, EMBEDDING_NORM, FUSED)),
    "chatglm": _Family("llama", (PARTIAL, INTERLEAVED, FUSED)),
    "codegen": _Family("gpt2", (PARALLEL, PARTIAL, INTERLEAVED, FUSED)),
    "cohere": _Family("llama", (PARALLEL, INTERLEAVED, MULTIPLIERS)),
    "cohere2": _Family("llama", (PARALLEL, INTERLEAVED, NO_ROPE, MULTIPLIERS)),
    "dbrx": _Family("llama", (EXPERTS, CLIP, FUSED)),
    "deepseek": _Family("llama", (EXPERTS,)),
    "deepseek_v2": _Family("llama", _DEEPSEEK),
    "deepseek_v3": _Family("llama", _DEEPSEEK),
    "deepseek_v32": _Family("llama", (*_DEEPSEEK, "sparse attention by an indexer")),
    "ernie4_5": _Family("llama", (INTERLEAVED,)),
    "ernie4_5_moe": _Family("llama", (EXPERTS, INTERLEAVED)),
    "exaone": _Family("llama", ("other tensor names",)),
    "exaone4": _Family("qwen3", (POST_NORM, NO_ROPE)),
    "falcon": _Family(
        "gpt2", (PARALLEL, FUSED, "LayerNorm with biases, but linear layers without")
    ),
    "falcon_h1": _Family("llama", (RECURRENT, MULTIPLIERS)),
    "falcon_mamba": _Family("llama", (RECURRENT,)),
    "gemma": _Family("llama", _GEMMA),
    "gemma2": _Family("llama", (*_GEMMA, SOFT_CAP, POST_NORM, MULTIPLIERS)),
    "gemma3": _Family("qwen3", (*_GEMMA, POST_NORM, LOCAL_BASE, MULTIPLIERS, INPUTS)),
    "gemma3_text": _Family("qwen3", (*_GEMMA, POST_NORM, LOCAL_BASE, MULTIPLIERS)),
    "gemma3n": _Family("qwen3", (*_GEMMA, POST_NORM, LOCAL_BASE, "per-layer embeddings", INPUTS)),
    "gemma3n_text": _Family("qwen3", (*_GEMMA, POST_NORM, LOCAL_BASE, "per-layer embeddings")),
    "glm": _Family("llama", (PARTIAL, INTERLEAVED, FUSED)),
    "glm4": _Family("llama", (PARTIAL, INTERLEAVED, FUSED, POST_NORM)),
    "glm4_moe": _Family("qwen3", (EXPERTS, PARTIAL)),
    "gpt_bigcode": _Family("gpt2", (MULTI_QUERY, FUSED)),
    "gpt_neo": _Family("gpt2", ("attention scores without the scale 1 / sqrt(D)",)),
    "gpt_neox": _Family("gpt2", (PARALLEL, PARTIAL, EXACT_GELU, FUSED)),
    "gpt_oss": _Family("mistral", (EXPERTS, OUTPUT_BIAS, "clamped SwiGLU")),
    "gptj": _Family("gpt2", (PARALLEL, PARTIAL, INTERLEAVED)),
    "granite": _Family("llama", (MULTIPLIERS,)),
    "granitemoe": _Family("llama", (EXPERTS, MULTIPLIERS)),
    "granitemoehybrid": _Family("llama", (EXPERTS, MULTIPLIERS, RECURRENT)),
    "helium": _Family("llama", (INTERLEAVED,)),
    "hunyuan_v1_dense": _Family("qwen3", ("query and key norms after RoPE",)),
    "hunyuan_v1_moe": _Family("qwen3", (EXPERTS, "query and key norms after RoPE")),
    "internlm2": _Family("llama", (FUSED,)),
    "internlm3": _Family("llama", ("other tensor names and options, in custom code",)),
    "jamba": _Family("llama", (EXPERTS, RECURRENT)),
    "kimi_k2": _Family("llama", _DEEPSEEK),
    "lfm2": _Family("llama", ("convolution layers",)),
    "llama4": _Family("llama", (EXPERTS, NO_ROPE, CHUNKED, INTERLEAVED, INPUTS)),
    "llama4_text": _Family("llama", (EXPERTS, NO_ROPE, CHUNKED, INTERLEAVED)),
    "llava": _Family("llama", (INPUTS,)),
    "mamba": _Family("llama", (RECURRENT,)),
    "mamba2": _Family("llama", (RECURRENT,)),
    "minicpm": _Family("llama", (MULTIPLIERS,)),
    "minicpm3": _Family("llama", (LATENT, MULTIPLIERS)),
    "minimax": _Family("mistral", (EXPERTS, RECURRENT)),
    "ministral": _Family("mistral", ("layer_types that mix windows and full attention",)),
    "ministral3": _Family("mistral", ("attention scores scaled by position",)),
    "mistral3": _Family("mistral", (INPUTS,)),
    "mixtral": _Family("mistral", (EXPERTS,)),
    "mllama": _Family("llama", (INPUTS,)),
    "mpt": _Family("gpt2", (ALIBI, FUSED, EXACT_GELU)),
    "nemotron": _Family(
        "llama", (SQUARED_RELU, PARTIAL, "LayerNorm that multiplies by 1 + weight")
    ),
    "olmo": _Family("llama", (PLAIN_NORM,)),
    "olmo2": _Family("llama", (POST_NORM, WIDE_QK_NORM)),
    "olmo3": _Family("mistral", (POST_NORM, WIDE_QK_NORM)),
    "olmoe": _Family("llama", (EXPERTS, WIDE_QK_NORM)),
    "opt": _Family("gpt2", (RELU, "learned positions that start at row 2")),
    "persimmon": _Family("llama", (PARTIAL, SQUARED_RELU, FUSED)),
    "phi": _Family("gpt2", (PARALLEL, PARTIAL)),
    "phi3": _Family("llama", (FUSED,)),
    "phimoe": _Family("mistral", (EXPERTS, LONGROPE)),
    "qwen": _Family("qwen2", (FUSED,)),
    "qwen2_5_vl": _Family("qwen2", (INPUTS,)),
    "qwen2_moe": _Family("qwen2", (EXPERTS,)),
    "qwen2_vl": _Family("qwen2", (INPUTS,)),
    "qwen3_moe": _Family("qwen3", (EXPERTS,)),
    "qwen3_next": _Family("qwen3", (EXPERTS, RECURRENT, OUTPUT_GATE, PARTIAL)),
    "qwen3_vl": _Family("qwen3", (INPUTS,)),
    "qwen3_vl_moe": _Family("qwen3", (EXPERTS, INPUTS)),
    "recurrent_gemma": _Family("llama", (RECURRENT, *_GEMMA)),
    "rwkv": _Family("llama", (RECURRENT,)),
    "seed_oss": _Family("qwen2", ("bias options without a key mapping here",)),
    "smollm3": _Family("llama", (NO_ROPE,)),
    "stablelm": _Family("llama", (PARTIAL, "SwiGLU with LayerNorm, which has no key mapping here")),
    "starcoder2": _Family(
        "mistral", ("LayerNorm and biases with RoPE, which has no key mapping here",)
    ),
    "t5": _Family("gpt2", (ENCODER,)),
    "zamba2": _Family("llama", (RECURRENT,)),
}


def nearest_and_missing(config: Fields) -> tuple[str, list[str]]:
    """Return the nearest supported family of an unsupported model, and its missing features.

    The list is empty if neither the table nor the keys of ``config`` indicate any.
    """
    known = _KNOWN.get(str(config.get("model_type")))
    indicated = [feature for feature, indicates in _INDICATORS.items() if _holds(indicates, config)]
    if known is None:
        return _nearest(config), indicated
    # For a known family the table has what it computes for "gelu": old configs of Gemma, for
    # example, mean the tanh approximation.
    indicated = [feature for feature in indicated if feature != EXACT_GELU]
    return known.nearest, list(dict.fromkeys([*known.missing, *indicated]))


def describe(config: Fields) -> str:
    """Return the missing features, the nearest family and all supported ones, for an error."""
    nearest, missing = nearest_and_missing(config)
    supported = f"Supported: {', '.join(FAMILIES)}."
    if not missing:
        return (
            f"{supported} Nearest by its keys: {nearest}; no key indicates a feature that "
            f"{nearest} lacks."
        )
    return f"Not supported here: {'; '.join(missing)}. Nearest: {nearest}. {supported}"


def _holds(indicates: Callable[[Fields], object], config: Fields) -> bool:
    """Evaluate an indicator on values of any type; a type it does not expect counts as False."""
    try:
        return bool(indicates(config))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return False


def _any(*keys: str) -> Callable[[Fields], object]:
    """Return an indicator of whether one of ``keys`` has a true value."""
    return lambda config: any(config.get(key) for key in keys)


def _other_than(value: float, *keys: str) -> Callable[[Fields], object]:
    """Return an indicator of whether one of ``keys`` is set to another value."""
    return lambda config: any(config.get(key) not in (None, value) for key in keys)


def _rope_type(config: Fields) -> object:
    rope = rope_config(config)
    return rope.get("rope_type", rope.get("type"))


def _activations(config: Fields) -> Iterable[object]:
    keys = ("hidden_act", "hidden_activation", "activation_function")
    return [config[key] for key in keys if config.get(key)]


def _has_partial_rotary_dim(config: Fields) -> object:
    heads = config.get("num_attention_heads") or config.get("n_head")
    hidden = config.get("hidden_size") or config.get("n_embd")
    head_dim = config.get("head_dim") or hidden // heads
    return config.get("rotary_dim") and config["rotary_dim"] < head_dim


def _has_partial_rope(config: Fields) -> object:
    has_factor = _other_than(1, "rotary_pct", "partial_rotary_factor", "rope_pct")
    return has_factor(config | rope_config(config)) or _holds(_has_partial_rotary_dim, config)


def _has_alibi(config: Fields) -> object:
    if config.get("alibi") or config.get("position_embedding_type") == "alibi":
        return True
    return config["attn_config"]["alibi"]


def _has_recurrent_layers(config: Fields) -> object:
    has_sizes = _any(
        "mamba_d_state", "ssm_state_size", "state_size", "linear_num_key_heads", "lru_width"
    )
    types = config.get("layer_types") or config.get("layers_block_type") or []
    return has_sizes(config) or _RECURRENT_LAYERS & set(types)


def _has_mrope(config: Fields) -> object:
    return _rope_type(config) == "mrope" or rope_config(config).get("mrope_section")


_RECURRENT_LAYERS = {"linear_attention", "mamba", "mamba2", "recurrent", "conv", "ssm"}
_INDICATORS: dict[str, Callable[[Fields], object]] = {
    EXPERTS: _any(
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "moe_intermediate_size",
    ),
    LATENT: _any("kv_lora_rank", "q_lora_rank"),
    SOFT_CAP: _any("attn_logit_softcapping", "final_logit_softcapping"),
    PARALLEL: _any("use_parallel_residual", "parallel_attn", "parallel_block"),
    PARTIAL: _has_partial_rope,
    ALIBI: _has_alibi,
    RECURRENT: _has_recurrent_layers,
    CHUNKED: lambda config: "chunked_attention" in (config.get("layer_types") or []),
    NO_ROPE: _any("no_rope_layers", "no_rope_layer_interval"),
    ENCODER: _any("is_encoder_decoder", "add_cross_attention"),
    INPUTS: _any("vision_config", "audio_config", "speech_config"),
    MULTIPLIERS: _any(
        "embedding_multiplier",
        "residual_multiplier",
        "attention_multiplier",
        "logits_scaling",
        "logit_scale",
        "scale_emb",
        "scale_depth",
        "query_pre_attn_scalar",
    ),
    CLIP: _any("clip_qkv"),
    RELU: lambda config: "relu" in _activations(config),
    SQUARED_RELU: lambda config: "relu2" in _activations(config),
    EXACT_GELU: lambda config: "gelu" in _activations(config),
    QUANTISED: _any("quantization_config"),
    LONGROPE: lambda config: _rope_type(config) in ("longrope", "su"),
    "dynamic scaling of RoPE": lambda config: _rope_type(config) == "dynamic",
    "multi-axis RoPE (mrope)": _has_mrope,
}


def _nearest(config: Fields) -> str:
    """Return the nearest family by the keys in which the supported families differ.

    They are GPT-2's names or norm, norms of heads, biases, and windows.
    """
    if "n_embd" in config or _any("layer_norm_epsilon", "layer_norm_eps")(config):
        return "gpt2"
    if _any("use_qk_norm", "qk_norm", "qk_layernorm")(config):
        return "qwen3"
    if _any("qkv_bias", "use_qkv_bias", "attention_qkv_bias")(config):
        return "qwen2"
    return "mistral" if _any("sliding_window")(config) else "llama"
