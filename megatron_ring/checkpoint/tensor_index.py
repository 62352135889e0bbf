"""The index of a checkpoint's tensors: the whole shape of every parameter, and the file of each of its boxes.

What is read may come from anywhere: it is an index if every element of every parameter is in one box, else it is
refused. That the files hold those boxes is seen when they are read.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from megatron_ring.checkpoint import boxes
from megatron_ring.checkpoint.boxes import Box
from megatron_ring.errors import CheckpointError

INDEX = "tensors.json"
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
"""What is kept of a parameter: itself, and Adam's two moments; a model without its optimizer has the first alone."""
Shapes = dict[str, tuple[int, ...]]
"""Of whole parameters, by their names in a GPT on one process."""
Written = tuple[str, Box]
"""What the index has to know of a piece: the parameter and the box."""
_PART = re.compile(r"part-\d{5,}\.safetensors", re.ASCII)


class Index(NamedTuple):
    """parts: of each parameter its boxes and their files."""

    kinds: tuple[str, ...]
    shapes: Shapes
    parts: dict[str, list[tuple[Box, str]]]


def part_name(number: int) -> str:
    """The file of process ``number``, or the ``number``-th of those that one process writes."""
    return f"part-{number:05d}.safetensors"


def encode(shapes: Shapes, kinds: Iterable[str], parts: list[list[Written]]) -> str:
    """The index of what the parts 0, 1, ... hold. Raises CheckpointError where that is not every element once."""
    found: dict[str, dict[str, str]] = {name: {} for name in shapes}
    for number, written in enumerate(parts):
        for name, box in written:
            if boxes.text(box) in found[name]:
                raise CheckpointError(f"{INDEX}: two parts have {name}[{boxes.text(box)}]")
            found[name][boxes.text(box)] = part_name(number)
    tensors = {name: {"shape": list(shapes[name]), "boxes": found[name]} for name in sorted(shapes)}
    content = json.dumps({"kinds": list(kinds), "tensors": tensors}, indent=1) + "\n"
    decode(content)
    return content


def decode(content: str | bytes) -> Index:
    """What ``encode`` was given. Raises CheckpointError for anything else."""
    try:
        document = json.loads(content)
        kinds, tensors = tuple(document["kinds"]), document["tensors"]
        if not tensors or not set(kinds) <= set(KINDS):
            raise ValueError("parameters or kinds")
        shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
        return Index(kinds, shapes, {name: _parts(name, entry, shapes[name]) for name, entry in tensors.items()})
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{INDEX} is not an index of tensors") from error


def _parts(name: str, entry: dict[str, Any], shape: tuple[int, ...]) -> list[tuple[Box, str]]:
    parts = [(boxes.parse(box), file) for box, file in entry["boxes"].items()]
    if not all(_PART.fullmatch(file) for _, file in parts):
        raise ValueError("a file that no process writes")
    if not parts or not boxes.partition([box for box, _ in parts], shape):
        raise CheckpointError(f"{INDEX}: the boxes of {name} do not make up its shape {shape}")
    return parts
