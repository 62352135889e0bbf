"""The tensors of a checkpoint: safetensors files of boxes, and an index that says which box of what is where.

    step-00000200/part-00003.safetensors   what process 3 held alone: "weight/embedding.weight[31:61,0:32]", ...
    step-00000200/tensors.json             every parameter: its whole shape, and the file of each of its boxes

A box is a rectangle of a whole parameter, under the name that it has in a GPT on one process. So a checkpoint knows
nothing of the processes that wrote it: any others read the boxes that overlap theirs, and only those.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_ring.checkpoint import boxes
from megatron_ring.checkpoint.boxes import Box
from megatron_ring.errors import CheckpointError

INDEX = "tensors.json"
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
"""What is kept of a parameter: itself, and Adam's two moments; a model without its optimizer has the first alone."""
PART_BYTES = 10**9
"""What one process puts into a file at most, if it has the choice."""


@dataclass(frozen=True)
class Piece:
    """A box of the parameter ``name``, and of each kind the values in it, shaped as the box."""

    name: str
    box: Box
    values: Mapping[str, torch.Tensor]


def part_name(number: int) -> str:
    """The file of process ``number``, or the ``number``-th of those that one process writes."""
    return f"part-{number:05d}.safetensors"


def write_part(folder: Path, number: int, pieces: Iterable[Piece]) -> list[tuple[str, Box]]:
    """Write a file of ``pieces``; returns what the index has to know of them. Raises CheckpointError."""
    pieces, path = list(pieces), folder / part_name(number)
    content = {_key(kind, p.name, p.box): x.contiguous() for p in pieces for kind, x in p.values.items()}
    try:
        save_file(content, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.name}: {getattr(error, 'strerror', None) or error}") from error
    return [(piece.name, piece.box) for piece in pieces]


def write_index(folder: Path, shapes: dict[str, tuple[int, ...]], kinds: Iterable[str], parts: list[list]) -> None:
    """Write the index of the parts 0, 1, ..., of which ``write_part`` returned ``parts``; ``shapes``: whole ones.

    Raises CheckpointError where the sizes of its boxes do not add up to a whole tensor.
    """
    found: dict[str, dict[str, str]] = {name: {} for name in shapes}
    for number, written in enumerate(parts):
        for name, box in written:
            found[name][boxes.text(box)] = part_name(number)
    tensors = {name: {"shape": list(shapes[name]), "boxes": found[name]} for name in sorted(shapes)}
    content = json.dumps({"kinds": list(kinds), "tensors": tensors}, indent=1)
    _decoded(content)
    (folder / INDEX).write_text(content + "\n")


def write_whole(folder: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write every parameter of ``shapes`` whole, without moments, in parts of at most about 1 GB, and their index.

    ``tensors`` are asked for one after another, so that memory holds one part of them. Raises CheckpointError.
    """
    pieces = (Piece(name, boxes.whole(shapes[name]), {WEIGHT: values}) for name, values in tensors)
    parts = [write_part(folder, number, part) for number, part in enumerate(_in_parts(pieces, PART_BYTES))]
    write_index(folder, shapes, [WEIGHT], parts)


def _in_parts(pieces: Iterable[Piece], limit: int) -> Iterator[list[Piece]]:
    """Neighbours together up to ``limit`` bytes; a larger one is a part of its own."""
    part, size = [], 0
    for piece in pieces:
        more = sum(values.nbytes for values in piece.values.values())
        if part and size + more > limit:
            yield part
            # Cleared, not replaced: who was given it still has the list, and would keep the tensors.
            part.clear()
            size = 0
        part.append(piece)
        size += more
    if part:
        yield part


@dataclass(frozen=True)
class Tensors:
    """The tensors in a checkpoint, read as they are asked for. kinds: which of ``KINDS`` there are of each."""

    path: Path
    kinds: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    _parts: dict[str, list[tuple[Box, str]]]
    _files: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def open(path: Path) -> "Tensors":
        """Of the checkpoint at ``path``, which was found whole before. Raises CheckpointError for a foreign index."""
        try:
            return Tensors(path, *_decoded((path / INDEX).read_text()))
        except OSError as error:
            raise CheckpointError(f"{path / INDEX} cannot be read: {error.strerror}") from error

    def read(self, name: str, kind: str = WEIGHT, box: Box | None = None) -> torch.Tensor:
        """A tensor of its own, in the type that was written: all of parameter ``name``, or a box of it."""
        box = boxes.whole(self.shapes[name]) if box is None else box
        out = torch.empty([len(indices) for indices in box], dtype=self.dtype(name, kind))
        self.read_into(out, name, kind, box)
        return out

    def read_into(self, out: torch.Tensor, name: str, kind: str, box: Box) -> None:
        """Fill ``out``, of any type and shaped as ``box``, with what parameter ``name`` has there."""
        for stored, file in self._parts[name]:
            if common := boxes.overlap(stored, box):
                with _read_errors(self.path / file):
                    values = self._file(file).get_slice(_key(kind, name, stored))
                    out[boxes.slices(boxes.within(common, box))] = values[boxes.slices(boxes.within(common, stored))]

    def dtype(self, name: str, kind: str = WEIGHT) -> torch.dtype:
        """The type that was written."""
        box, file = self._parts[name][0]
        with _read_errors(self.path / file):
            none_of_it = tuple(slice(0, 0) for _ in box)
            return self._file(file).get_slice(_key(kind, name, box))[none_of_it].dtype

    def _file(self, name: str) -> Any:
        """Opened once: a memory map."""
        if name not in self._files:
            self._files[name] = safe_open(self.path / name, framework="pt")
        return self._files[name]


def _key(kind: str, name: str, box: Box) -> str:
    return f"{kind}/{name}[{boxes.text(box)}]"


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _decoded(content: str) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]], dict[str, list[tuple[Box, str]]]]:
    """kinds, shapes and boxes with their files; raises CheckpointError unless every element is in one box."""
    try:
        document = json.loads(content)
        kinds, tensors = tuple(document["kinds"]), document["tensors"]
        shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
        parts = {
            name: [(boxes.parse(box), file) for box, file in entry["boxes"].items()] for name, entry in tensors.items()
        }
        for name, shape in shapes.items():
            _check_cover(name, shape, [box for box, _ in parts[name]])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{INDEX} is not an index of tensors") from error
    return kinds, shapes, parts


def _check_cover(name: str, shape: tuple[int, ...], found: list[Box]) -> None:
    inside = [box for box in found if boxes.overlap(box, boxes.whole(shape)) == box]
    if len(inside) < len(found) or sum(map(boxes.size, found)) != boxes.size(boxes.whole(shape)):
        raise CheckpointError(f"{INDEX}: the boxes of {name} do not make up its shape {shape}")
