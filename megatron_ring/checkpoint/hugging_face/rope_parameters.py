"""The mapping of RoPE and its scaling in a config.json, as transformers reads it.

transformers 5 writes everything to rope_parameters, and still reads the older keys rope_theta and
rope_scaling, which take precedence. Both are written with the same content, for programs that read
either.
"""

import math

from megatron_ring.checkpoint.hugging_face.key_mappings import Fields, KeyMapping, get_or
from megatron_ring.config import ModelConfig
from megatron_ring.untrusted import shown

_DEFAULT_BASE = 10000.0
LONGEST = 2**31 - 1
"""The largest number of tokens of a sequence: the largest value of --seq-length."""
_PARAMETERS_OF_ALL_TYPES = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# The parameters that each rope_type uses besides those.
_PARAMETERS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    },
}
# Parameters for which kernels/rope.py supports only one value.
_CONSTANTS = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
}


def _read(config: Fields, problems: list[str]) -> Fields:
    rope = rope_config(config)
    base = float(get_or(rope, "rope_theta", get_or(config, "rope_theta", _DEFAULT_BASE)))
    rope_type = _rope_type(rope)
    problems += _partial_rotary_problems(config, rope)
    for name in ("rope_scaling", "rope_parameters"):
        if config.get(name) and not isinstance(config[name], dict):
            problems.append(
                f"{name} is {shown(config[name])}, and must be an object of keys and values."
            )
            return {}
    if not isinstance(rope_type, str) or rope_type not in _PARAMETERS:
        supported = ", ".join(_PARAMETERS)
        problems.append(
            f"RoPE's rope_type is {shown(rope_type)}, which is not supported. "
            f"Supported: {supported}."
        )
        return {}
    fields = {"rotary_base": base}
    if rope_type != "default":
        fields |= _read_scaling(rope_type, rope, config, problems)
    return fields


def rope_config(config: Fields) -> Fields:
    """Return the rope_scaling or rope_parameters that takes precedence.

    Returns an empty dict if neither is an object.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    return rope if isinstance(rope, dict) else {}


def _rope_type(rope: Fields) -> object:
    """Return the value of rope_type, which may be of any type."""
    return get_or(rope, "rope_type", get_or(rope, "type", "default"))


def unread_parameters(config: Fields) -> list[str]:
    """Return the names of RoPE parameters that its rope_type does not use.

    transformers ignores them too, for example DeepSeek's attn_factor and Yarn-Llama's finetuned.
    """
    rope = rope_config(config)
    rope_type = _rope_type(rope)
    used = set(_PARAMETERS_OF_ALL_TYPES)
    if isinstance(rope_type, str):
        used |= _PARAMETERS.get(rope_type, set())
    return sorted(name for name, value in rope.items() if value is not None and name not in used)


def _partial_rotary_problems(config: Fields, rope: Fields) -> list[str]:
    key = "partial_rotary_factor"
    factor = get_or(rope, key, get_or(config, key, 1))
    if factor == 1:
        return []
    return [f"{key} is {shown(factor)}, and must be 1: RoPE is applied to whole heads here."]


def _read_scaling(rope_type: str, rope: Fields, config: Fields, problems: list[str]) -> Fields:
    original = original_length(config)
    factor = rope.get("factor")
    if factor is None and rope_type == "yarn":
        factor = config["max_position_embeddings"] / original
    if not isinstance(factor, (int, float)) or not factor >= 1:
        problems.append(f"RoPE's factor is {shown(factor)}, and must be a number of at least 1.")
        return {}
    if type(original) is not int or original < 1:
        problems.append(
            f"original_max_position_embeddings is {shown(original)}, and must be a whole number."
        )
        return {}
    used = {name: rope[name] for name in _PARAMETERS[rope_type] & rope.keys()}
    problems += _constant_problems(used, factor)
    if factor == 1:
        return {}  # no scaling, whatever the rope_type
    if factor > LONGEST / original:
        problems.append(
            f"RoPE's factor is {shown(factor)}, and must be at most {LONGEST} / {original}: it "
            f"extends {original} tokens, and a sequence has at most {LONGEST}."
        )
        return {}
    fields = {"rope_scaling": rope_type, "rope_scaling_factor": float(factor)}
    # Only the frequencies of these types depend on the original length.
    if rope_type in ("yarn", "llama3"):
        fields["rope_original_length"] = original
    return fields


def original_length(config: Fields) -> int:
    """Return the sequence length before RoPE scaling, according to the model's config.json."""
    key = "original_max_position_embeddings"
    nested = get_or(rope_config(config), key, config["max_position_embeddings"])
    return get_or(config, key, nested)


def _constant_problems(rope: Fields, factor: float) -> list[str]:
    """Return a problem for each parameter that has another value than kernels/rope.py supports."""
    magnitude = 0.1 * math.log(factor) + 1
    expected = _CONSTANTS | {"attention_factor": magnitude}
    problems = [
        f"RoPE's {name} is {shown(rope[name])}, and must be {value}: kernels/rope.py supports no "
        "other value."
        for name, value in expected.items()
        if rope.get(name) is not None and not math.isclose(rope[name], value, rel_tol=1e-6)
    ]
    # The only one of these keys whose null is not the default: transformers treats it as false.
    if "truncate" in rope and rope["truncate"] is None:
        problems.append(
            "RoPE's truncate is None, and must be True or left out: kernels/rope.py supports no "
            "other value."
        )
    if rope.get("mscale") and rope.get("mscale_all_dim") and rope.get("attention_factor") is None:
        problems.append(
            "RoPE's mscale and mscale_all_dim, which change YaRN's temperature, are not supported."
        )
    return problems


def _write(model: ModelConfig) -> Fields:
    scaling = _write_scaling(model)
    parameters = {"rope_type": "default"} | scaling | {"rope_theta": model.rotary_base}
    keys = {"rope_theta": model.rotary_base, "rope_parameters": parameters}
    if scaling:
        keys["rope_scaling"] = scaling
    return keys


def _write_scaling(model: ModelConfig) -> Fields:
    if model.rope_scaling == "none":
        return {}
    keys = {"rope_type": model.rope_scaling, "factor": model.rope_scaling_factor}
    if model.rope_scaling in ("yarn", "llama3"):
        keys["original_max_position_embeddings"] = model.rope_original_length
    if model.rope_scaling == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            keys[name] = float(_CONSTANTS[name])
    return keys


ROPE = KeyMapping(_read, _write)
