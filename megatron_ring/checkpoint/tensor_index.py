"""The index of a checkpoint's tensors: the shape of every parameter and the file of each box.

The file that is read may come from anywhere: it is refused unless every element of every parameter
is in exactly one box. Whether the files hold those boxes is checked when they are read.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from pydantic import ConfigDict, Field

from megatron_ring import untrusted
from megatron_ring.checkpoint import boxes
from megatron_ring.checkpoint.boxes import Box
from megatron_ring.errors import CheckpointError

INDEX = "tensors.json"
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
"""The tensors of a parameter: itself and Adam's moments, or only itself without an optimizer."""
Shapes = dict[str, tuple[int, ...]]
"""Shapes of whole parameters, by their names in a GPT on one process."""
Written = tuple[str, Box]
"""The index entry of a piece: the parameter and the box."""
BYTES = 512 * untrusted.MIB
"""The size limit of the index. For 70e9 parameters, split over 1,024 ranks by ZeRO 3, it is about
130 MB."""
_PART = r"^part-[0-9]{5,10}\.safetensors$"


class Index(NamedTuple):
    """A decoded index. parts: for each parameter, its boxes and the file of each."""

    kinds: tuple[str, ...]
    shapes: Shapes
    parts: dict[str, list[tuple[Box, str]]]


def part_name(number: int) -> str:
    """Return the name of the file of process ``number``, or of the ``number``-th of one process."""
    return f"part-{number:05d}.safetensors"


def encode(shapes: Shapes, kinds: Iterable[str], parts: list[list[Written]]) -> str:
    """Return the index of all parts; ``parts`` has the pieces of each, in order of their numbers.

    Raises CheckpointError unless they hold every element exactly once.
    """
    files: dict[str, dict[str, str]] = {name: {} for name in shapes}
    for number, written in enumerate(parts):
        for name, box in written:
            text = boxes.to_text(box)
            if text in files[name]:
                raise CheckpointError(f"{INDEX}: two parts have {name}[{text}]")
            files[name][text] = part_name(number)
    tensors = {name: {"shape": list(shapes[name]), "boxes": files[name]} for name in sorted(shapes)}
    content = json.dumps({"kinds": list(kinds), "tensors": tensors}, indent=1) + "\n"
    decode(content.encode())
    return content


def decode(content: bytes) -> Index:
    """Return the index that ``encode`` wrote. Raises CheckpointError for any other content."""
    try:
        document = untrusted.parse_json(content, _Document)
        shapes = {name: entry.shape for name, entry in document.tensors.items()}
        parts = {name: _parts(name, entry) for name, entry in document.tensors.items()}
    except ValueError as error:  # UntrustedInputError is one
        raise CheckpointError(f"{INDEX} is not an index of tensors: {error}") from error
    return Index(document.kinds, shapes, parts)


_STRICT = ConfigDict(extra="forbid")
_Length = Annotated[int, Field(ge=1, le=untrusted.LARGEST_INTEGER)]
_MOST_DIMS = 8


@dataclass(frozen=True)
class _Entry:
    __pydantic_config__ = _STRICT
    shape: Annotated[tuple[_Length, ...], Field(max_length=_MOST_DIMS)]
    boxes: Annotated[dict[str, Annotated[str, Field(pattern=_PART)]], Field(min_length=1)]


@dataclass(frozen=True)
class _Document:
    __pydantic_config__ = _STRICT
    kinds: tuple[Literal["weight", "exp_avg", "exp_avg_sq"], ...]
    tensors: Annotated[dict[str, _Entry], Field(min_length=1)]


def _parts(name: str, entry: _Entry) -> list[tuple[Box, str]]:
    parts = [(boxes.parse(box), file) for box, file in entry.boxes.items()]
    if not boxes.is_partition([box for box, _ in parts], entry.shape):
        raise CheckpointError(
            f"{INDEX}: the boxes of {name} do not make up its shape {entry.shape}"
        )
    return parts
