"""The tensors of a checkpoint: safetensors files of boxes, and an index of the file of each box.

    step-00000200/part-00003.safetensors   what only process 3 held:
                                           "weight/embedding.weight[31:61,0:32]", ...
    step-00000200/tensors.json             every parameter: its shape and the file of each box

A box is a rectangle of a whole parameter, under the parameter's name in a GPT on one process. So a
checkpoint does not depend on the grid that wrote it: processes of any grid read the boxes that
overlap theirs, and only those.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
"""The dtypes that parameters may have, by their names in safetensors."""
PART_BYTES = 10**9
"""The size limit of a file when one process writes whole tensors."""


@dataclass(frozen=True)
class Piece:
    """A box of the parameter ``name``, with the values of each kind, in the shape of the box."""

    name: str
    box: Box
    values: Mapping[str, torch.Tensor]

    def on_cpu(self) -> "Piece":
        """Return a copy on the CPU that later changes of the values do not affect."""
        copies = {kind: values.to("cpu", copy=True) for kind, values in self.values.items()}
        return Piece(self.name, self.box, copies)


def write_part(folder: Path, number: int, pieces: Iterable[Piece]) -> list[Written]:
    """Write a file of ``pieces``; returns their index entries.

    Raises CheckpointError, and NonFiniteTensor before anything is written if a value is nan or
    infinite.
    """
    pieces = list(pieces)
    path = folder / part_name(number)
    content = {}
    for piece in pieces:
        for kind, values in piece.values.items():
            content[_key(kind, piece.name, piece.box)] = values.contiguous()
    for key, values in content.items():
        check_finite(values, key)
    with _write_errors(path):
        save_file(content, path)
    return [(piece.name, piece.box) for piece in pieces]


def write_index(
    folder: Path, shapes: Shapes, kinds: Iterable[str], parts: list[list[Written]]
) -> None:
    """Write the index of all parts, in the order of their numbers.

    ``parts`` has what ``write_part`` returned for each; ``shapes`` are those of whole parameters.
    Raises CheckpointError if the index cannot be written, or if any element of a parameter is not
    in exactly one box.
    """
    with _write_errors(folder / INDEX):
        (folder / INDEX).write_text(encode(shapes, kinds, parts))


def write_whole(folder: Path, shapes: Shapes, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write the index and every parameter of ``shapes`` whole, without moments.

    Parts have at most ``PART_BYTES`` bytes, unless a single tensor is larger. ``tensors`` is
    consumed one by one, so that one part is in memory at a time. Raises CheckpointError.
    """
    pieces = (Piece(name, boxes.whole(shapes[name]), {WEIGHT: values}) for name, values in tensors)
    parts = [
        write_part(folder, number, part)
        for number, part in enumerate(_in_parts(pieces, PART_BYTES))
    ]
    write_index(folder, shapes, [WEIGHT], parts)


def _in_parts(pieces: Iterable[Piece], limit: int) -> Iterator[list[Piece]]:
    """Yield consecutive pieces grouped up to ``limit`` bytes; a larger one is a group of its own.

    Every group is the same list object, cleared in between.
    """
    part: list[Piece] = []
    size = 0
    for piece in pieces:
        piece_bytes = sum(values.nbytes for values in piece.values.values())
        if part and size + piece_bytes > limit:
            yield part
            # Cleared, not replaced: the consumer still has the list, which would keep the tensors.
            part.clear()
            size = 0
        part.append(piece)
        size += piece_bytes
    if part:
        yield part


CLOSE_AFTER_BYTES = 2**27
"""Bytes read from all mapped files before they are closed; 128 MiB."""


@dataclass
class _MappedFiles:
    """Memory-mapped files of ``folder``, by name: a file is opened once for many boxes.

    What was read through a map counts as this process's memory until the map is closed. So all maps
    are closed from time to time and opened again on demand. read_bytes: since the last time.
    """

    folder: Path
    opened: dict[str, Any] = field(default_factory=dict)
    read_bytes: int = 0

    def open(self, name: str) -> Any:
        """Return the safetensors reader of a file.

        Raises UntrustedInputError if it is not a regular file.
        """
        if name not in self.opened:
            check_regular(self.folder / name)
            self.opened[name] = safe_open(self.folder / name, framework="pt")
        return self.opened[name]

    def count(self, read_bytes: int) -> None:
        """Count bytes that were copied out of the maps, and close the maps after enough of them.

        A map that is still in use stays open.
        """
        self.read_bytes += read_bytes
        if self.read_bytes >= CLOSE_AFTER_BYTES:
            self.opened.clear()
            self.read_bytes = 0


class _Copy(NamedTuple):
    """Part of a read: copy ``values[source]`` to ``out[target]``. values: a safetensors slice."""

    target: tuple[slice, ...]
    values: Any
    source: tuple[slice, ...]


@dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint, read on demand. kinds: those of ``KINDS`` that it has."""

    path: Path
    kinds: tuple[str, ...]
    shapes: Shapes
    _parts: dict[str, list[tuple[Box, str]]]
    _files: _MappedFiles

    @staticmethod
    def open(path: Path) -> "Tensors":
        """Open the tensors of the checkpoint at ``path``, which was verified before.

        Raises CheckpointError for an invalid index.
        """
        with errors_as(CheckpointError, path / INDEX, "Use another checkpoint."):
            content = read_bytes(path / INDEX, INDEX_BYTES)
        try:
            return Tensors(path, *decode(content), _MappedFiles(path))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}. Use another checkpoint.") from error

    def check_shapes(self, expected: Shapes) -> None:
        """Raise CheckpointError if parameters are missing or have other shapes than ``expected``.

        The error names each of them.
        """
        problems = [
            f"{self.path}: {name} is {self.shapes.get(name, 'missing')} there, {shape} here."
            for name, shape in expected.items()
            if self.shapes.get(name) != shape
        ]
        if problems:
            raise CheckpointError(problems)

    def read(self, name: str, kind: str = WEIGHT, box: Box | None = None) -> torch.Tensor:
        """Return parameter ``name``, or a box of it, as a new tensor in the stored dtype."""
        box = boxes.whole(self.shapes[name]) if box is None else box
        copies = list(self._copies(name, kind, box))
        dtype = self.dtype(name, kind)
        if {TYPES[copy.values.get_dtype()] for copy in copies} - {dtype}:
            raise CheckpointError(
                f"{self.path}: the boxes of {kind}/{name} do not all have the same dtype"
            )
        out = torch.empty([len(indices) for indices in box], dtype=dtype)
        self._fill(out, copies)
        return out

    def read_into(self, out: torch.Tensor, name: str, kind: str, box: Box) -> None:
        """Fill ``out`` with a box of parameter ``name``; it has the shape of the box, any dtype."""
        self._fill(out, self._copies(name, kind, box))

    def dtype(self, name: str, kind: str = WEIGHT) -> torch.dtype:
        """Return the stored dtype of parameter ``name``."""
        box, file = self._parts[name][0]
        return TYPES[self._stored(name, kind, box, file).get_dtype()]

    def _copies(self, name: str, kind: str, box: Box) -> Iterator[_Copy]:
        for stored_box, file in self._parts[name]:
            common = boxes.overlap(stored_box, box)
            if common is not None:
                yield _Copy(
                    target=boxes.slices(boxes.relative_to(common, box)),
                    values=self._stored(name, kind, stored_box, file),
                    source=boxes.slices(boxes.relative_to(common, stored_box)),
                )

    def _stored(self, name: str, kind: str, box: Box, file: str) -> Any:
        """Return the safetensors slice of a box in ``file``, without reading its values.

        Raises CheckpointError if it does not match the index.
        """
        key = _key(kind, name, box)
        path = self.path / file
        with _read_errors(path):
            values = self._files.open(file).get_slice(key)
        shape = values.get_shape()
        dtype = values.get_dtype()
        if shape != [len(indices) for indices in box] or dtype not in TYPES:
            raise CheckpointError(f"{path} cannot be read: {key} is {dtype} {shape} there")
        return values

    def _fill(self, out: torch.Tensor, copies: Iterable[_Copy]) -> None:
        for copy in copies:
            out[copy.target] = copy.values[copy.source]
        self._files.count(out.nbytes)


def _key(kind: str, name: str, box: Box) -> str:
    return f"{kind}/{name}[{boxes.to_text(box)}]"


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path.name}: {reason}") from error


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, UntrustedInputError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
