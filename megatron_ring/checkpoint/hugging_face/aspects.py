"""What config.json and ModelConfig say of the same thing, and how each is told from the other.

A family's whole config is a list of these. A key that is absent or null has the default of transformers' class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_ring.config import ModelConfig
from megatron_ring.untrusted import shown

Fields = dict[str, Any]
"""What a config.json says, by its keys; or what a ModelConfig does, by its fields."""


@dataclass(frozen=True)
class Aspect:
    """``read`` takes a config.json and a list that it adds problems to, and gives fields of ModelConfig.

    ``write`` takes a ModelConfig whose every default is resolved, and gives keys of config.json.
    """

    read: Callable[[Fields, list[str]], Fields]
    write: Callable[[ModelConfig], Fields]


def get_or(config: Fields, key: str, default: Any) -> Any:
    """The value of ``key``, or ``default`` where it is absent or null."""
    return default if (value := config.get(key)) is None else value


def missing_sizes(config: Fields, *keys: str) -> list[str]:
    """What to say of the keys that are no sizes."""
    found = []
    for key in keys:
        value, limit = config.get(key), _LARGEST.get(key, 2**31 - 1)
        if type(value) is not int or not 1 <= value <= limit:
            found.append(
                f"{key} is {shown(value)}, and must be a whole number above 0, {limit} at most."
            )
    return found


_LARGEST = dict.fromkeys(("num_hidden_layers", "n_layer"), 2**16)
"""The limits of sizes that are counted up to, rather than multiplied."""


def truth(config: Fields, key: str, default: bool, problems: list[str]) -> bool:
    """Return the value of ``key``, or ``default`` where it is absent or null.

    Anything but true and false is added to ``problems``.
    """
    value = get_or(config, key, default)
    if isinstance(value, bool):
        return value
    problems.append(f"{key} is {shown(value)}, and must be true or false.")
    return default


def size(key: str, field: str) -> Aspect:
    """A number that every config.json of the family has."""

    def read(config: Fields, problems: list[str]) -> Fields:
        problems += (missing := missing_sizes(config, key))
        # 1, so that the rest can be read, and all that is wrong be told at once.
        return {field: 1 if missing else config[key]}

    return Aspect(read, lambda model: {key: getattr(model, field)})


def key(name: str, field: str, default: int | float) -> Aspect:
    """One key, one field, one meaning; a whole number if ``default`` is one."""

    def read(config: Fields, problems: list[str]) -> Fields:
        value = get_or(config, name, default)
        if type(value) in (int, type(default)):
            return {field: type(default)(value)}
        problems.append(
            f"{name} is {shown(value)}, and must be a{' whole' * isinstance(default, int)} number."
        )
        return {}

    return Aspect(read, lambda model: {name: getattr(model, field)})


def key_value_heads(default: int) -> Aspect:
    """The number of key-value heads: ``default`` where it is absent, and as many as query heads where it is null."""
    name, field = "num_key_value_heads", "num_query_groups"
    aspect = key(name, field, default)

    def read(config: Fields, problems: list[str]) -> Fields:
        null = name in config and config[name] is None
        return {field: 0} if null else aspect.read(config, problems)

    return Aspect(read, aspect.write)


def only(name: str, *values: Any, because: str) -> Aspect:
    """A key that our models have no choice for: the first of ``values`` is written, and is the default; no field."""

    def read(config: Fields, problems: list[str]) -> Fields:
        if (value := get_or(config, name, values[0])) not in values:
            legal = " or ".join(repr(value) for value in values)
            problems.append(f"{name} is {shown(value)}, and must be {legal}: {because}.")
        return {}

    return Aspect(read, lambda model: {} if values[0] is None else {name: values[0]})


def always(**values: Any) -> Aspect:
    """Fields that are the same in every model of the family, and that config.json does not mention."""
    return Aspect(lambda config, problems: values, lambda model: {})


def written(**values: Any) -> Aspect:
    """Keys that describe how others would train the model, and that are read by nobody here."""
    return Aspect(lambda config, problems: {}, lambda model: values)


def tied(default: bool) -> Aspect:
    """Whether the head's matrix is the embedding."""
    untied = "untie_embeddings_and_output_weights"
    return Aspect(
        lambda config, problems: {
            untied: not truth(config, "tie_word_embeddings", default, problems)
        },
        lambda model: {"tie_word_embeddings": not getattr(model, untied)},
    )


def whole_heads(width: str, heads: str) -> Aspect:
    """transformers asks that the width divide into heads, even where heads have a size of their own."""

    def read(config: Fields, problems: list[str]) -> Fields:
        if not missing_sizes(config, width, heads) and config[width] % config[heads]:
            problems.append(
                f"{width} {config[width]} does not divide into {heads} {config[heads]}."
            )
        return {}

    return Aspect(read, lambda model: {})


def linear_biases() -> Aspect:
    """Llama's two keys for what is one field here: biases in every linear layer, or in none."""

    def read(config: Fields, problems: list[str]) -> Fields:
        attention, mlp = (
            truth(config, name, False, problems) for name in ("attention_bias", "mlp_bias")
        )
        if attention != mlp:
            problems.append(
                f"attention_bias is {attention} and mlp_bias {mlp}: biases are in all linear layers or none."
            )
        return {"add_bias_linear": attention and mlp}

    return Aspect(
        read, lambda model: dict.fromkeys(("attention_bias", "mlp_bias"), model.add_bias_linear)
    )
