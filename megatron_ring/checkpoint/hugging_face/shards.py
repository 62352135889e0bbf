"""A model's weights in one safetensors file or in several with their index, as transformers names them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_ring.checkpoint import single_file
from megatron_ring.checkpoint.hugging_face.folder import INDEX, WEIGHTS
from megatron_ring.checkpoint.single_file import Entry
from megatron_ring.errors import ConfigError

_ABOUT = {"format": "pt"}  # transformers refuses a file that does not say so
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def write_shards(
    folder: Path, entries: list[Entry], limit: int, read: Callable[[Entry], torch.Tensor]
) -> list[str]:
    """Write ``entries`` to files of at most ``limit`` bytes of tensors, a larger one alone; returns the files' names.

    ``read`` is asked for one tensor after another, and memory holds no other. Raises CheckpointError.
    """
    shards = _in_shards(entries, limit)
    names = _names(len(shards))
    for name, shard in zip(names, shards):
        # Wide types first, so that every tensor begins at a multiple of its elements' size.
        shard.sort(key=lambda entry: -entry.dtype.itemsize)
        single_file.write(folder / name, shard, read, _ABOUT)
    if len(names) == 1:
        return names
    index = {
        "metadata": {"total_size": sum(entry.bytes for entry in entries)},
        "weight_map": {entry.name: name for name, shard in zip(names, shards) for entry in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [*names, INDEX]


def parse_size(text: str) -> int:
    """Bytes: ``"5GB"`` is 5 * 10^9. Raises ConfigError."""
    number, unit = (text[:-2], text[-2:].upper()) if text[-2:].upper() in _UNITS else (text, "")
    try:
        size = int(float(number) * _UNITS.get(unit, 1))
    except (OverflowError, ValueError):
        size = 0
    if size < 1:
        raise ConfigError(
            f"max_shard_size {text!r} is no size, such as 500MB or 5GB. Set --max-shard-size."
        )
    return size


def _in_shards(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Neighbours together."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + entry.bytes > limit:
            shards.append([])
        shards[-1].append(entry)
    return shards


def _names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
