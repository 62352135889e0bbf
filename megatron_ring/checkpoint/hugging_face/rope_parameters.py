"""RoPE and its stretch in a config.json: rope_parameters, or rope_theta and rope_scaling, as transformers reads them.

transformers 5 writes rope_parameters with everything in it, and still reads the older two keys, which then count. Both
are written, with the same content, so that readers of either age find theirs.
"""

import math

from megatron_ring.checkpoint.hugging_face.key_mappings import Aspect, Fields, get_or
from megatron_ring.config import ModelConfig
from megatron_ring.untrusted import shown

_DEFAULT_BASE = 10000.0
LONGEST = 2**31 - 1
"""The most tokens of a sequence: the largest value that --seq-length has."""
_OF_ANY_KIND = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# What each kind may say besides.
_STRETCHES: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor",
        "mscale", "mscale_all_dim",
    },
}  # fmt: skip
# Where kernels/rope.py has no choice.
_CONSTANTS = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
}


def _read(config: Fields, problems: list[str]) -> Fields:
    rope = config_of_rope(config)
    base = float(get_or(rope, "rope_theta", get_or(config, "rope_theta", _DEFAULT_BASE)))
    kind = _kind(rope)
    problems += _partial(config, rope)
    for name in ("rope_scaling", "rope_parameters"):
        if config.get(name) and not isinstance(config[name], dict):
            return _problem(
                problems,
                f"{name} is {shown(config[name])}, and must be an object of keys and values.",
            )
    if not isinstance(kind, str) or kind not in _STRETCHES:
        known = ", ".join(_STRETCHES)
        return _problem(
            problems,
            f"RoPE's rope_type is {shown(kind)}, which has no counterpart here. Known: {known}.",
        )
    stretch = _read_stretch(kind, rope, config, problems) if kind != "default" else {}
    return {"rotary_base": base, **stretch}


def config_of_rope(config: Fields) -> Fields:
    """The keys and values of the rope_scaling or rope_parameters that count; empty where neither is an object."""
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    return rope if isinstance(rope, dict) else {}


def _kind(rope: Fields) -> object:
    """The value of rope_type, which may be of any type."""
    return get_or(rope, "rope_type", get_or(rope, "type", "default"))


def unread_parameters(config: Fields) -> list[str]:
    """Names of RoPE parameters that its kind does not use.

    transformers passes over them too: DeepSeek's attn_factor, for example, or Yarn-Llama's finetuned.
    """
    rope = config_of_rope(config)
    kind = _kind(rope)
    known = _OF_ANY_KIND | (_STRETCHES.get(kind, set()) if isinstance(kind, str) else set())
    return sorted(name for name, value in rope.items() if value is not None and name not in known)


def _partial(config: Fields, rope: Fields) -> list[str]:
    share = get_or(rope, "partial_rotary_factor", get_or(config, "partial_rotary_factor", 1))
    if share == 1:
        return []
    return [f"partial_rotary_factor is {shown(share)}, and must be 1: RoPE turns whole heads here."]


def _problem(problems: list[str], problem: str) -> Fields:
    problems.append(problem)
    return {}


def _read_stretch(kind: str, rope: Fields, config: Fields, problems: list[str]) -> Fields:
    original = original_length(config)
    factor = rope.get("factor")
    if factor is None and kind == "yarn":
        factor = config["max_position_embeddings"] / original
    if not isinstance(factor, (int, float)) or not factor >= 1:
        return _problem(
            problems, f"RoPE's factor is {shown(factor)}, and must be a number of at least 1."
        )
    if type(original) is not int or original < 1:
        return _problem(
            problems,
            f"original_max_position_embeddings is {shown(original)}, and must be a whole number.",
        )
    problems += _differing_constants(
        {name: rope[name] for name in _STRETCHES[kind] & rope.keys()}, factor
    )
    if factor == 1:
        return {}  # of every kind the same as none
    if factor > LONGEST / original:
        return _problem(
            problems,
            f"RoPE's factor is {shown(factor)}, and must be at most {LONGEST} / {original}: it stretches {original} "
            f"tokens, and a sequence has at most {LONGEST}.",
        )
    # Only these kinds have frequencies that depend on it.
    lengths = {"rope_original_length": original} if kind in ("yarn", "llama3") else {}
    return {"rope_scaling": kind, "rope_scaling_factor": float(factor), **lengths}


def original_length(config: Fields) -> int:
    """The tokens that the model was trained on before its RoPE was stretched, as far as its config.json tells."""
    inside = get_or(
        config_of_rope(config),
        "original_max_position_embeddings",
        config["max_position_embeddings"],
    )
    return get_or(config, "original_max_position_embeddings", inside)


def _differing_constants(rope: Fields, factor: float) -> list[str]:
    magnitude = 0.1 * math.log(factor) + 1
    expected = _CONSTANTS | {"attention_factor": magnitude}
    found = [
        f"RoPE's {name} is {shown(rope[name])}, and must be {value}: kernels/rope.py has no other."
        for name, value in expected.items()
        if rope.get(name) is not None and not math.isclose(rope[name], value, rel_tol=1e-6)
    ]
    # Of these keys only this one has a null that is not the default: transformers takes it for false.
    if "truncate" in rope and rope["truncate"] is None:
        found.append(
            "RoPE's truncate is None, and must be True or left out: kernels/rope.py has no other."
        )
    if rope.get("mscale") and rope.get("mscale_all_dim") and rope.get("attention_factor") is None:
        found.append(
            "RoPE's mscale and mscale_all_dim, which change YaRN's temperature, have no counterpart here."
        )
    return found


def _write(model: ModelConfig) -> Fields:
    stretch = _WRITTEN[model.rope_scaling](model)
    kind = {"rope_type": "default"} | stretch
    old = {"rope_scaling": stretch} if stretch else {}
    return {
        "rope_theta": model.rotary_base,
        "rope_parameters": kind | {"rope_theta": model.rotary_base},
    } | old


def _stretched(model: ModelConfig) -> Fields:
    return {"rope_type": model.rope_scaling, "factor": model.rope_scaling_factor}


def _from_original(model: ModelConfig) -> Fields:
    return _stretched(model) | {"original_max_position_embeddings": model.rope_original_length}


def _llama3(model: ModelConfig) -> Fields:
    return _from_original(model) | {
        name: float(_CONSTANTS[name]) for name in ("low_freq_factor", "high_freq_factor")
    }


_WRITTEN = {
    "none": lambda model: {},
    "linear": _stretched,
    "yarn": _from_original,
    "llama3": _llama3,
}

ROPE = Aspect(_read, _write)
