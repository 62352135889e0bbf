"""Mappings between keys of a config.json and fields of ModelConfig, in both directions.

A family's config is a list of these (families.py). A key that is absent or null has the default of
transformers' config class. RoPE's keys are in rope_parameters.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_ring.config import ModelConfig
from megatron_ring.untrusted import shown

Fields = dict[str, Any]
"""The content of a config.json by its keys, or values of ModelConfig by its fields."""


@dataclass(frozen=True)
class KeyMapping:
    """A mapping between keys of config.json and fields of ModelConfig.

    ``read`` takes a config.json and a list to which it appends problems, and returns fields of
    ModelConfig. ``write`` takes a ModelConfig with all defaults resolved, and returns keys of
    config.json.
    """

    read: Callable[[Fields, list[str]], Fields]
    write: Callable[[ModelConfig], Fields]


def get_or(config: Fields, key: str, default: Any) -> Any:
    """Return the value of ``key``, or ``default`` if it is absent or null."""
    value = config.get(key)
    return default if value is None else value


# Sizes that are iterated over, not just multiplied, have a lower limit.
_LARGEST = {"num_hidden_layers": 2**16, "n_layer": 2**16}


def invalid_sizes(config: Fields, *keys: str) -> list[str]:
    """Return a problem for each of the keys whose value is not a valid size."""
    problems = []
    for key in keys:
        value = config.get(key)
        limit = _LARGEST.get(key, 2**31 - 1)
        if type(value) is not int or not 1 <= value <= limit:
            problems.append(
                f"{key} is {shown(value)}, and must be a whole number above 0, {limit} at most."
            )
    return problems


def get_bool(config: Fields, key: str, default: bool, problems: list[str]) -> bool:
    """Return the value of ``key``, or ``default`` if it is absent or null.

    Any value other than true and false is added to ``problems``.
    """
    value = get_or(config, key, default)
    if isinstance(value, bool):
        return value
    problems.append(f"{key} is {shown(value)}, and must be true or false.")
    return default


# ---- mappings of one or two keys ----


def size(key: str, field: str) -> KeyMapping:
    """Map a size that every config.json of the family has."""

    def read(config: Fields, problems: list[str]) -> Fields:
        invalid = invalid_sizes(config, key)
        problems += invalid
        # 1, so that the rest can be read and all problems are reported at once.
        return {field: 1 if invalid else config[key]}

    return KeyMapping(read, lambda model: {key: getattr(model, field)})


def number(key: str, field: str, default: int | float) -> KeyMapping:
    """Map a number; it must be a whole number if ``default`` is one."""
    whole = " whole" if isinstance(default, int) else ""

    def read(config: Fields, problems: list[str]) -> Fields:
        value = get_or(config, key, default)
        if type(value) in (int, type(default)):
            return {field: type(default)(value)}
        problems.append(f"{key} is {shown(value)}, and must be a{whole} number.")
        return {}

    return KeyMapping(read, lambda model: {key: getattr(model, field)})


def key_value_heads(default: int) -> KeyMapping:
    """Map the number of key-value heads.

    It is ``default`` if the key is absent, and the number of query heads if it is null.
    """
    key = "num_key_value_heads"
    field = "num_query_groups"
    mapping = number(key, field, default)

    def read(config: Fields, problems: list[str]) -> Fields:
        is_null = key in config and config[key] is None
        return {field: 0} if is_null else mapping.read(config, problems)

    return KeyMapping(read, mapping.write)


def required(key: str, *values: Any, because: str) -> KeyMapping:
    """Require a key to have one of ``values``, because the models here support nothing else.

    The first value is the default, and the one that is written; None is not written.
    """
    legal = " or ".join(repr(value) for value in values)

    def read(config: Fields, problems: list[str]) -> Fields:
        value = get_or(config, key, values[0])
        if value not in values:
            problems.append(f"{key} is {shown(value)}, and must be {legal}: {because}.")
        return {}

    return KeyMapping(read, lambda model: {} if values[0] is None else {key: values[0]})


def implied(**fields: Any) -> KeyMapping:
    """Set fields that all models of the family share and that config.json does not contain."""
    return KeyMapping(lambda config, problems: fields, lambda model: {})


def export_only(**keys: Any) -> KeyMapping:
    """Write keys that tell other programs how to train the model; an import ignores them."""
    return KeyMapping(lambda config, problems: {}, lambda model: keys)


def tied_embeddings(default: bool) -> KeyMapping:
    """Map whether the output matrix is the embedding."""
    key = "tie_word_embeddings"
    field = "untie_embeddings_and_output_weights"

    def read(config: Fields, problems: list[str]) -> Fields:
        return {field: not get_bool(config, key, default, problems)}

    return KeyMapping(read, lambda model: {key: not getattr(model, field)})


def divisible(width: str, heads: str) -> KeyMapping:
    """Require that ``width`` is divisible by ``heads``.

    transformers does so even if the head dimension is given separately.
    """

    def read(config: Fields, problems: list[str]) -> Fields:
        if not invalid_sizes(config, width, heads) and config[width] % config[heads]:
            problems.append(
                f"{width} {config[width]} does not divide into {heads} {config[heads]}."
            )
        return {}

    return KeyMapping(read, lambda model: {})


def linear_biases() -> KeyMapping:
    """Map Llama's two keys to one field: biases in all linear layers, or in none."""

    def read(config: Fields, problems: list[str]) -> Fields:
        attention = get_bool(config, "attention_bias", False, problems)
        mlp = get_bool(config, "mlp_bias", False, problems)
        if attention != mlp:
            problems.append(
                f"attention_bias is {attention} and mlp_bias {mlp}: only biases in all linear "
                "layers, or in none, are supported."
            )
        return {"add_bias_linear": attention and mlp}

    def write(model: ModelConfig) -> Fields:
        return {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear}

    return KeyMapping(read, write)


# ---- sliding windows: in all layers of Mistral, in some layers of Qwen ----

_FULL = "full_attention"
_SLIDING = "sliding_attention"
_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28
_SHOWN_LAYERS = 64


def _window(config: Fields, problems: list[str]) -> int:
    """Return the window size, 0 for none. For this key null means none, not the default."""
    window = config.get("sliding_window", _DEFAULT_WINDOW)
    if window is None:
        return 0
    problems += invalid_sizes({"sliding_window": window}, "sliding_window")
    return window


def _read_mistral_window(config: Fields, problems: list[str]) -> Fields:
    """Read the one window of all layers.

    transformers ignores layer_types for Mistral, but other programs read it, so it must agree.
    """
    window = _window(config, problems)
    types = config.get("layer_types")
    expected = _SLIDING if window else _FULL
    agrees = (
        isinstance(types, list)
        and len(types) == config.get("num_hidden_layers")
        and all(kind == expected for kind in types)
    )
    if types is not None and not agrees:
        problems.append(
            f"layer_types is {shown(types)}, and must be {expected} for each of num_hidden_layers, "
            "or null: transformers' Mistral has one window for all layers, sliding_window "
            f"{shown(window or None)}."
        )
    return {"window_size": window}


MISTRAL_WINDOW = KeyMapping(
    _read_mistral_window,
    lambda model: {"sliding_window": model.window_size or None},
)


def _read_qwen_windows(config: Fields, problems: list[str]) -> Fields:
    uses_window = get_bool(config, "use_sliding_window", False, problems)
    window = _window(config, problems) if uses_window else 0
    types = get_or(config, "layer_types", _default_layer_types(config, window))
    if len(types) != config.get("num_hidden_layers") or not set(types) <= {_FULL, _SLIDING}:
        problems.append(
            f"layer_types is {shown(types)}, and must be {_FULL} or {_SLIDING} for each of "
            "num_hidden_layers."
        )
        return {}
    if _SLIDING in types and not window:
        problems.append(
            f"layer_types has {_SLIDING}, but use_sliding_window and sliding_window set no window."
        )
        return {}
    fields = _window_fields([window if kind == _SLIDING else 0 for kind in types])
    if fields is None:
        problems.append(
            f"the layers with a sliding window, {_describe_windowed_layers(types)} of "
            f"{len(types)}, are not supported: it must be in all layers, in none, or in all but "
            "layers N - 1, 2N - 1, ... (window_attn_skip_freq N)."
        )
        return {}
    return fields


def _default_layer_types(config: Fields, window: int) -> list[str]:
    """Return the layer types of a config without that key: windows from max_window_layers on."""
    if invalid_sizes(config, "num_hidden_layers"):
        return []
    first = get_or(config, "max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
    layers = range(config["num_hidden_layers"])
    return [_SLIDING if window and layer >= first else _FULL for layer in layers]


def _window_fields(windows: list[int]) -> Fields | None:
    """Return window_size and window_attn_skip_freq for the window of each layer.

    Returns None if no values of them give each layer its window.
    """
    if not any(windows):
        return {}
    # The first layer without a window is layer N - 1.
    skip_freq = windows.index(0) + 1 if 0 in windows else 0
    fields = {"window_size": max(windows), "window_attn_skip_freq": skip_freq}
    model = ModelConfig(**fields)
    matches = [model.window_of(layer) for layer in range(len(windows))] == windows
    return fields if matches else None


def _describe_windowed_layers(types: list[str]) -> str:
    layers = [str(layer) for layer, kind in enumerate(types) if kind == _SLIDING]
    if len(layers) > _SHOWN_LAYERS:
        layers = [*layers[:_SHOWN_LAYERS], "..."]
    return ", ".join(layers)


def _write_qwen_windows(model: ModelConfig) -> Fields:
    layers = range(model.num_layers)
    return {
        "use_sliding_window": model.window_size > 0,
        "sliding_window": model.window_size or None,
        # The only key that transformers before 4.53 reads: it cannot express full layers between
        # layers with a window.
        "max_window_layers": 0 if model.window_size else model.num_layers,
        "layer_types": [_SLIDING if model.window_of(layer) else _FULL for layer in layers],
    }


QWEN_WINDOWS = KeyMapping(_read_qwen_windows, _write_qwen_windows)
