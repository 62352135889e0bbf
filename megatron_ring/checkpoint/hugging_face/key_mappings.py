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


_FULL, _SLIDING = "full_attention", "sliding_attention"
_DEFAULT_WINDOW, _QWENS_FIRST_LAYER = 4096, 28
_NAMED = 64


def _window(config: Fields, problems: list[str]) -> int:
    """0: none, which null means; here it is not the default."""
    window = config.get("sliding_window", _DEFAULT_WINDOW)
    if window is None:
        return 0
    problems += missing_sizes({"sliding_window": window}, "sliding_window")
    return window


def _read_mistral(config: Fields, problems: list[str]) -> Fields:
    """One window for all layers: transformers does not read layer_types, other readers do, so it may only agree."""
    window = _window(config, problems)
    types = config.get("layer_types")
    expected = _SLIDING if window else _FULL
    layers = config.get("num_hidden_layers")
    agrees = (
        isinstance(types, list) and len(types) == layers and all(kind == expected for kind in types)
    )
    if types is not None and not agrees:
        problems.append(
            f"layer_types is {shown(types)}, and must be {expected} for each of num_hidden_layers, or null: "
            f"transformers' Mistral has one window for all layers, sliding_window {shown(window or None)}."
        )
    return {"window_size": window}


MISTRAL = Aspect(
    _read_mistral,
    lambda model: {"sliding_window": model.window_size or None},
)


def _read_qwen(config: Fields, problems: list[str]) -> Fields:
    window = (
        _window(config, problems) if truth(config, "use_sliding_window", False, problems) else 0
    )
    types = get_or(config, "layer_types", _types_from(config, window))
    if len(types) != config.get("num_hidden_layers") or not set(types) <= {_FULL, _SLIDING}:
        problems.append(
            f"layer_types is {shown(types)}, and must be {_FULL} or {_SLIDING} for each of num_hidden_layers."
        )
    elif _SLIDING in types and not window:
        problems.append(
            f"layer_types has {_SLIDING}, but use_sliding_window and sliding_window name no window."
        )
    elif (fields := _fields([window if kind == _SLIDING else 0 for kind in types])) is None:
        problems.append(
            f"the layers with a sliding window, {_numbers(types)} of {len(types)}, cannot be said here: all must have "
            "it, or none, or all but layers N - 1, 2N - 1, ... (window_attn_skip_freq N)."
        )
    else:
        return fields
    return {}


def _types_from(config: Fields, window: int) -> list[str]:
    """What configs without layer_types mean: the window is on the layers from max_window_layers on."""
    if missing_sizes(config, "num_hidden_layers"):
        return []
    layers = range(config["num_hidden_layers"])
    first = get_or(config, "max_window_layers", _QWENS_FIRST_LAYER)
    return [_SLIDING if window and layer >= first else _FULL for layer in layers]


def _fields(windows: list[int]) -> Fields | None:
    """window_size and window_attn_skip_freq that give each layer its window, None where there are none."""
    if not any(windows):
        return {}
    # The first layer without a window is layer N - 1.
    fields = {
        "window_size": max(windows),
        "window_attn_skip_freq": windows.index(0) + 1 if 0 in windows else 0,
    }
    model = ModelConfig(**fields)
    return fields if [model.window_of(layer) for layer in range(len(windows))] == windows else None


def _numbers(types: list[str]) -> str:
    numbers = [str(layer) for layer, kind in enumerate(types) if kind == _SLIDING]
    return ", ".join([*numbers[:_NAMED], "..."] if len(numbers) > _NAMED else numbers)


def _write_qwen(model: ModelConfig) -> Fields:
    return {
        "use_sliding_window": model.window_size > 0,
        "sliding_window": model.window_size or None,
        # All that transformers before 4.53 reads: it cannot say that full layers lie between others.
        "max_window_layers": 0 if model.window_size else model.num_layers,
        "layer_types": [
            _SLIDING if model.window_of(layer) else _FULL for layer in range(model.num_layers)
        ],
    }


QWEN = Aspect(_read_qwen, _write_qwen)
