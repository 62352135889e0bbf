"""Writes one safetensors file of whole tensors from a checkpoint of any grid.

The writer of the safetensors library needs all tensors at once. The format is a header with the
dtype, shape and offsets of each tensor, followed by their bytes
(https://github.com/huggingface/safetensors#format), so it can be written with one tensor in memory.
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
_CHUNK = 2**20
"""Elements that are converted at a time."""


@dataclass(frozen=True)
class Entry:
    """A tensor that the file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor in the file."""
        return boxes.size(boxes.whole(self.shape)) * self.dtype.itemsize


def consolidate(checkpoint: Summary, file: Path, kind: str, dtype: torch.dtype | None) -> int:
    """Write the ``kind`` tensor of every parameter to ``file``; returns the bytes of the file.

    They are written as ``dtype``, or as stored if it is None, one tensor in memory at a time. The
    file gets its name once it is complete. Raises CheckpointError if a value is too large for
    ``dtype`` or the file cannot be written.
    """
    stored = checkpoint.tensors
    entries = [
        Entry(name, dtype or stored.dtype(name, kind), stored.shapes[name])
        for name in checkpoint.names(kind, "*")
    ]
    # Wide dtypes first, as safetensors does, so that every tensor is aligned to its element size.
    entries.sort(key=lambda entry: (-entry.dtype.itemsize, entry.name))
    return write(
        file, entries, lambda entry: stored.read(entry.name, kind), _metadata(checkpoint, kind)
    )


def _metadata(checkpoint: Summary, kind: str) -> dict[str, str]:
    """Return the file's metadata. The format allows text only, so the model's options are JSON."""
    state = checkpoint.state
    return {
        "format": "pt",
        "kind": kind,
        "model": json.dumps(asdict(checkpoint.config.model)),
        "step": str(state.step),
        "vocab_size": str(state.vocab_size),
        "seq_length": str(state.seq_length),
    }


def write(
    file: Path,
    entries: list[Entry],
    read: Callable[[Entry], torch.Tensor],
    metadata: dict[str, str],
) -> int:
    """Write the tensor that ``read`` returns for each entry, in the entry's dtype.

    Returns the bytes of the file. Raises CheckpointError as ``consolidate`` does.
    """
    partial = file.with_name(f".partial-{file.name}")
    try:
        with untrusted.create(partial) as stream:
            stream.write(_header(entries, metadata))
            for entry in entries:
                _write_tensor(read(entry), entry, stream)
            size = stream.tell()
        disk.flush(partial)
        disk.rename(partial, file)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be written: {error.strerror}. Set FILE to another path."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return size


def _header(entries: Iterable[Entry], metadata: dict[str, str]) -> bytes:
    """Return the header: its size in 8 bytes, then JSON.

    The JSON has the dtype and shape of each tensor, and the offsets of its first byte and of the
    byte after its last.
    """
    content = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        start = end
        end += entry.bytes
        content[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(tensor: torch.Tensor, entry: Entry, stream: BinaryIO) -> None:
    """Convert and write a chunk at a time, without a converted copy of the whole tensor."""
    for chunk in tensor.flatten().split(_CHUNK):
        converted = chunk.to(entry.dtype)
        if converted.isfinite().sum() != chunk.isfinite().sum():
            raise CheckpointError(_too_large(chunk, entry))
        stream.write(converted.view(torch.uint8).numpy())


def _too_large(values: torch.Tensor, entry: Entry) -> str:
    largest = values[values.isfinite()].abs().max().item()
    limits = torch.finfo(entry.dtype)
    return (
        f"{entry.name} has values up to {largest:.4g}, and the largest {limits.dtype} is "
        f"{limits.max:.4g}. Set --dtype."
    )
