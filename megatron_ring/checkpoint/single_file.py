"""One safetensors file of whole tensors, from a checkpoint of any grid, for whoever knows nothing of grids.

safetensors' own writer wants all tensors at once. The format is a header that tells type, shape and place of each, and
their bytes (https://github.com/huggingface/safetensors#format), so that it can be written with one in memory.
"""

import contextlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_ring import untrusted
from megatron_ring.checkpoint import boxes, disk, tensors
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.errors import CheckpointError

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CODES = {dtype: code for code, dtype in tensors.TYPES.items()}
_STRETCH = 2**20
"""Elements that are converted at a time."""


@dataclass(frozen=True)
class Entry:
    """A tensor that the file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return boxes.size(boxes.whole(self.shape)) * self.dtype.itemsize


def consolidate(checkpoint: Summary, file: Path, kind: str, dtype: torch.dtype | None) -> int:
    """Write what is kept as ``kind`` of every parameter, as ``dtype`` or as stored; returns the bytes of the file.

    Under its name when whole, or not at all. One tensor is in memory at a time. Raises CheckpointError where a value is
    too large for ``dtype`` or the file cannot be written.
    """
    kept, shapes = checkpoint.tensors, checkpoint.tensors.shapes
    entries = [
        Entry(name, dtype or kept.dtype(name, kind), shapes[name])
        for name in checkpoint.names(kind, "*")
    ]
    # As safetensors has it: large types first, so that every tensor begins at a multiple of its elements' size.
    entries.sort(key=lambda entry: (-entry.dtype.itemsize, entry.name))
    return write(
        file, entries, lambda entry: kept.read(entry.name, kind), metadata(checkpoint, kind)
    )


def metadata(checkpoint: Summary, kind: str) -> dict[str, str]:
    """What the file says of itself. The format allows text alone: the model's options are JSON."""
    state = checkpoint.state
    told = {"step": state.step, "vocab_size": state.vocab_size, "seq_length": state.seq_length}
    model = json.dumps(asdict(checkpoint.config.model))
    return {
        "format": "pt",
        "kind": kind,
        "model": model,
        **{key: str(value) for key, value in told.items()},
    }


def write(
    file: Path, entries: list[Entry], read: Callable[[Entry], torch.Tensor], about: dict[str, str]
) -> int:
    """Write what ``read`` gives for each of ``entries``, in the entry's type; returns the bytes of the file."""
    partial = file.with_name(f".partial-{file.name}")
    try:
        with untrusted.create(partial) as stream:
            stream.write(header(entries, about))
            for entry in entries:
                _stream(read(entry), entry, stream)
            size = stream.tell()
        disk.flush(partial)
        disk.rename(partial, file)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be written: {error.strerror}. Give FILE another name."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return size


def header(entries: Iterable[Entry], about: dict[str, str]) -> bytes:
    """Its own size in 8 bytes, then JSON: of each tensor type, shape, first byte and the one after its last."""
    content, end = {"__metadata__": about}, 0
    for entry in entries:
        start, end = end, end + entry.bytes
        content[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _stream(tensor: torch.Tensor, entry: Entry, stream: BinaryIO) -> None:
    """A stretch at a time, so that no copy of all in another type is made."""
    for stretch in tensor.flatten().split(_STRETCH):
        converted = stretch.to(entry.dtype)
        if converted.isfinite().sum() != stretch.isfinite().sum():
            raise CheckpointError(_too_large(stretch, entry))
        stream.write(converted.view(torch.uint8).numpy())


def _too_large(values: torch.Tensor, entry: Entry) -> str:
    largest, end = values[values.isfinite()].abs().max().item(), torch.finfo(entry.dtype)
    return f"{entry.name} has values up to {largest:.4g}, and {end.dtype} ends at {end.max:.4g}. Set --dtype."
