"""config.json to ModelConfig and back, and whether a family can say exactly what a ModelConfig does.

That is asked of the way there and back: what comes back another, the family cannot express.
"""

from dataclasses import asdict, replace
from typing import Any

from megatron_ring.checkpoint.hugging_face.aspects import Fields
from megatron_ring.checkpoint.hugging_face.families import FAMILIES, Family
from megatron_ring.config import Config, ModelConfig
from megatron_ring.errors import CheckpointError
from megatron_ring.untrusted import shown


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
