"""Which layers have the sliding window: Mistral's all, Qwen's those that layer_types or max_window_layers name."""

from megatron_ring.checkpoint.hugging_face.aspects import (
    Aspect,
    Fields,
    get_or,
    missing_sizes,
    truth,
)
from megatron_ring.config import ModelConfig
from megatron_ring.untrusted import shown

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
