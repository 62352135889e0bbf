"""The tensors of a checkpoint: safetensors files of boxes, and an index that says which box of what is where.

    step-00000200/part-00003.safetensors   what process 3 held alone: "weight/embedding.weight[31:61,0:32]", ...
    step-00000200/tensors.json             every parameter: its whole shape, and the file of each of its boxes

A box is a rectangle of a whole parameter, under the name that it has in a GPT on one process. So a checkpoint knows
nothing of the processes that wrote it: any others read the boxes that overlap theirs, and only those.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_ring.checkpoint import boxes
from megatron_ring.checkpoint.boxes import Box
from megatron_ring.checkpoint.finite import check_finite
from megatron_ring.checkpoint.tensor_index import BYTES as INDEX_BYTES
from megatron_ring.checkpoint.tensor_index import (
    INDEX,
    WEIGHT,
    Shapes,
    Written,
    decode,
    encode,
    part_name,
)
from megatron_ring.checkpoint.tensor_index import KINDS as KINDS
from megatron_ring.checkpoint.tensor_index import MOMENTS as MOMENTS
from megatron_ring.errors import CheckpointError
from megatron_ring.untrusted import UntrustedInputError, check_regular, errors_as, read_bytes

TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Those that parameters have, under their names in safetensors."""
PART_BYTES = 10**9
"""What one process puts into a file at most, if it has the choice."""


@dataclass(frozen=True)
class Piece:
    """A box of the parameter ``name``, and of each kind the values in it, shaped as the box."""

    name: str
    box: Box
    values: Mapping[str, torch.Tensor]

    def on_cpu(self) -> "Piece":
        """A copy that what becomes of the values leaves alone."""
        return Piece(
            self.name, self.box, {kind: x.to("cpu", copy=True) for kind, x in self.values.items()}
        )


def write_part(folder: Path, number: int, pieces: Iterable[Piece]) -> list[Written]:
    """Write a file of ``pieces``; returns what the index has to know of them.

    Raises CheckpointError, and NotFinite before anything is written where a value of theirs is nan
    or infinite.
    """
    pieces, path = list(pieces), folder / part_name(number)
    content = {
        _key(kind, p.name, p.box): x.contiguous() for p in pieces for kind, x in p.values.items()
    }
    for key, values in content.items():
        check_finite(values, key)
    with _write_errors(path):
        save_file(content, path)
    return [(piece.name, piece.box) for piece in pieces]


def write_index(
    folder: Path, shapes: Shapes, kinds: Iterable[str], parts: list[list[Written]]
) -> None:
    """Write the index of the parts 0, 1, ..., of which ``write_part`` returned ``parts``; ``shapes``: whole ones.

    Raises CheckpointError, also where its boxes do not have every element of every parameter once.
    """
    with _write_errors(folder / INDEX):
        (folder / INDEX).write_text(encode(shapes, kinds, parts))


def write_whole(folder: Path, shapes: Shapes, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write every parameter of ``shapes`` whole, without moments, in parts of at most about 1 GB, and their index.

    ``tensors`` are asked for one after another, so that memory holds one part of them. Raises CheckpointError.
    """
    pieces = (Piece(name, boxes.whole(shapes[name]), {WEIGHT: values}) for name, values in tensors)
    parts = [
        write_part(folder, number, part)
        for number, part in enumerate(_in_parts(pieces, PART_BYTES))
    ]
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


CLOSED_AFTER = 2**27
"""Bytes read of all maps; 128 MiB."""


@dataclass
class MappedFiles:
    """Those in ``folder``, by name. read_bytes: since they were closed."""

    folder: Path
    opened: dict[str, Any] = field(default_factory=dict)
    read_bytes: int = 0

    def open(self, name: str) -> Any:
        """What safetensors reads a file with. Raises UntrustedInputError where it is not a regular file."""
        if name not in self.opened:
            check_regular(self.folder / name)
            self.opened[name] = safe_open(self.folder / name, framework="pt")
        return self.opened[name]

    def count(self, read_bytes: int) -> None:
        """After this many more bytes were copied to where they are kept. What is still in use stays mapped."""
        self.read_bytes += read_bytes
        if self.read_bytes >= CLOSED_AFTER:
            self.opened.clear()
            self.read_bytes = 0


_Read = tuple[tuple[slice, ...], Any, tuple[slice, ...]]
"""Where in a tensor something goes, what safetensors has opened of it, and where it is in that."""


@dataclass(frozen=True)
class Tensors:
    """The tensors in a checkpoint, read as they are asked for. kinds: which of ``KINDS`` there are of each."""

    path: Path
    kinds: tuple[str, ...]
    shapes: Shapes
    _parts: dict[str, list[tuple[Box, str]]]
    _files: MappedFiles

    @staticmethod
    def open(path: Path) -> "Tensors":
        """Of the checkpoint at ``path``, which was found whole before. Raises CheckpointError for a foreign index."""
        with errors_as(CheckpointError, path / INDEX, "Give another checkpoint."):
            content = read_bytes(path / INDEX, INDEX_BYTES)
        try:
            return Tensors(path, *decode(content), MappedFiles(path))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}. Give another checkpoint.") from error

    def check_shapes(self, expected: Shapes) -> None:
        """Raise CheckpointError, naming each, where parameters are missing or have other shapes than ``expected``."""
        differing = [
            f"{self.path}: {name} is {self.shapes.get(name, 'missing')} there, {shape} here."
            for name, shape in expected.items()
            if self.shapes.get(name) != shape
        ]
        if differing:
            raise CheckpointError(differing)

    def read(self, name: str, kind: str = WEIGHT, box: Box | None = None) -> torch.Tensor:
        """A tensor of its own, in the type that was written: all of parameter ``name``, or a box of it."""
        box = boxes.whole(self.shapes[name]) if box is None else box
        pieces = list(self._pieces(name, kind, box))
        dtype = self.dtype(name, kind)
        if {TYPES[values.get_dtype()] for _, values, _ in pieces} - {dtype}:
            raise CheckpointError(f"{self.path}: the boxes of {kind}/{name} are not of one type")
        return self._filled(torch.empty([len(indices) for indices in box], dtype=dtype), pieces)

    def read_into(self, out: torch.Tensor, name: str, kind: str, box: Box) -> None:
        """Fill ``out``, of any type and shaped as ``box``, with what parameter ``name`` has there."""
        self._filled(out, self._pieces(name, kind, box))

    def dtype(self, name: str, kind: str = WEIGHT) -> torch.dtype:
        """The type that was written."""
        return TYPES[self._stored(name, kind, *self._parts[name][0]).get_dtype()]

    def _pieces(self, name: str, kind: str, box: Box) -> Iterator[_Read]:
        for stored, file in self._parts[name]:
            common = boxes.overlap(stored, box)
            if common is not None:
                values = self._stored(name, kind, stored, file)
                yield (
                    boxes.slices(boxes.within(common, box)),
                    values,
                    boxes.slices(boxes.within(common, stored)),
                )

    def _stored(self, name: str, kind: str, box: Box, file: str) -> Any:
        """What ``file`` has of a box, unread. Raises CheckpointError where it is not what the index says."""
        key, path = _key(kind, name, box), self.path / file
        with _read_errors(path):
            values = self._files.open(file).get_slice(key)
        if (
            values.get_shape() != [len(indices) for indices in box]
            or values.get_dtype() not in TYPES
        ):
            raise CheckpointError(
                f"{path} cannot be read: {key} is {values.get_dtype()} {values.get_shape()} there"
            )
        return values

    def _filled(self, out: torch.Tensor, pieces: Iterable[_Read]) -> torch.Tensor:
        for target, values, source in pieces:
            out[target] = values[source]
        self._files.count(out.nbytes)
        return out


def _key(kind: str, name: str, box: Box) -> str:
    return f"{kind}/{name}[{boxes.text(box)}]"


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path.name}: {getattr(error, 'strerror', None) or error}"
        ) from error


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, UntrustedInputError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
