"""Export of a checkpoint, written on any grid, to a folder that transformers loads."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_ring.checkpoint import disk, locate, single_file
from megatron_ring.checkpoint.hugging_face import tensor_mapping
from megatron_ring.checkpoint.hugging_face.families import FAMILIES, choose_family, write_model
from megatron_ring.checkpoint.hugging_face.folder import (
    BESIDE,
    CARRIED,
    CONFIG,
    INDEX,
    WEIGHTS,
    copy_beside,
    read_json,
)
from megatron_ring.checkpoint.hugging_face.key_mappings import Fields
from megatron_ring.checkpoint.hugging_face.special_tokens import GENERATION, SpecialTokens
from megatron_ring.checkpoint.hugging_face.tensor_mapping import Module, Tensor
from megatron_ring.checkpoint.locate import Located
from megatron_ring.checkpoint.single_file import Entry
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.checkpoint.tensors import Tensors
from megatron_ring.errors import CheckpointError, ConfigError
from megatron_ring.model.shapes import parameter_shapes

_STORED = "stored"
_METADATA = {"format": "pt"}  # transformers refuses a file without it
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export."""

    family: Literal["", "llama", "mistral", "qwen2", "qwen3", "gpt2"] = ""
    """Family to export as. Empty: the imported one, or the first that fits the model exactly."""
    dtype: Literal["stored", "fp32", "bf16", "fp16"] = _STORED
    """dtype of the weights. stored: as in the checkpoint, which is fp32 after training."""
    max_shard_size: str = "5GB"
    """Largest total size of the tensors in a file; KB, MB and GB are powers of 1000."""
    tokenizer: Path | None = None
    """Folder with the tokenizer's files. None: those in the checkpoint, if it was imported."""


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    reason: why this family was chosen. special: ids of the tokens that begin and end a text.
    longest: tokens of the longest sequence according to config.json. files: the files written.
    carried: the files copied.
    """

    checkpoint: Located
    family: str
    reason: str
    special: SpecialTokens
    dtypes: set[torch.dtype]
    longest: int
    files: list[str]
    carried: list[str]


def export_checkpoint(checkpoint: Path, out: Path, options: ExportOptions) -> Exported:
    """Export a checkpoint, or the newest one in a --save folder, to ``out``.

    ``out`` is written completely or not at all. Raises CheckpointError, and ConfigError for an
    invalid shard size.
    """
    shard_bytes = parse_size(options.max_shard_size)
    located = locate.locate(checkpoint)
    _check_empty(out)
    tokenizer = _tokenizer_folder(located.path, options.tokenizer)
    locate.verify(located.path)
    stored = Summary.of(located.path)
    model = stored.config.model
    vocab_size = stored.state.vocab_size
    seq_length = stored.state.seq_length
    stored.tensors.check_shapes(parameter_shapes(model, vocab_size, seq_length))
    imported_from = _imported_from(located.path)
    name, reason = choose_family(options.family, model, seq_length, imported_from)
    family = FAMILIES[name]
    special = SpecialTokens.find(tokenizer, stored.state.end_of_document)
    if options.tokenizer:
        special.check_rows(vocab_size)
    weights = _Weights.of(stored.tensors, family.modules, options.dtype)
    entries = weights.entries()
    dtypes = {entry.dtype for entry in entries}
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    config = _config(name, vocab_size, widest) | special.ids
    config |= write_model(family, model, seq_length)
    with _complete_or_absent(out) as partial:
        files = [CONFIG, *write_shards(partial, entries, shard_bytes, weights.read)]
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        carried = copy_beside(tokenizer, partial) if tokenizer else []
        if special.write_generation_config(partial) and GENERATION not in carried:
            files.append(GENERATION)
    longest = config[family.length]
    return Exported(located, name, reason, special, dtypes, longest, files, carried)


def _check_empty(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} already exists. Set a new folder, or an empty one.")


def _tokenizer_folder(checkpoint: Path, given: Path | None) -> Path | None:
    """Return the folder to copy the tokenizer's files from, None if there is none."""
    if given is None:
        return checkpoint / CARRIED if (checkpoint / CARRIED).is_dir() else None
    if not any((given / name).is_file() for name in BESIDE):
        raise CheckpointError(
            f"{given} has none of {', '.join(BESIDE)}. Set --tokenizer, or leave it out."
        )
    return given


def _imported_from(checkpoint: Path) -> str:
    """Return the model_type that a checkpoint was imported from, "" if it was not imported."""
    path = checkpoint / CARRIED / CONFIG
    return str(read_json(path).get("model_type")) if path.is_file() else ""


def _config(family: str, vocab_size: int, dtype: torch.dtype) -> Fields:
    """Return the keys of config.json that are not part of the model's description."""
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "model_type": family,
        "architectures": [FAMILIES[family].architecture],
        "vocab_size": vocab_size,
        # transformers before 5 reads torch_dtype, later versions read dtype.
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
        "use_cache": True,
    }


@contextlib.contextmanager
def _complete_or_absent(out: Path) -> Iterator[Path]:
    """Yield a hidden folder that is renamed to ``out`` on success and deleted otherwise."""
    out = out.absolute()
    partial = out.with_name(f".partial-{out.name}")
    try:
        disk.delete(partial)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            disk.flush(file)
        disk.flush_names(partial)
        disk.rename(partial, out)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {out}: {error.strerror}. Set another path or use another disk."
        ) from error
    finally:
        disk.delete(partial)


@dataclass(frozen=True)
class _Weights:
    """The weights of a checkpoint in the form of a family, one tensor in memory at a time.

    theirs: every tensor to write, by name. dtype: stored, fp32, bf16 or fp16.
    """

    stored: Tensors
    theirs: dict[str, Tensor]
    dtype: str

    @staticmethod
    def of(stored: Tensors, table: dict[str, Module], dtype: str) -> "_Weights":
        """Map all parameters by a table of a family's modules."""
        return _Weights(stored, tensor_mapping.tensors(table, stored.shapes), dtype)

    def entries(self) -> list[Entry]:
        """Return the tensors to write, layer by layer."""
        return [
            Entry(name, self._dtype(tensor), tensor.shape) for name, tensor in self.theirs.items()
        ]

    def read(self, entry: Entry) -> torch.Tensor:
        """Return the values of one of ``entries`` in the stored dtype."""
        tensor = self.theirs[entry.name]
        return tensor.join([self.stored.read(name) for name in tensor.parts])

    def _dtype(self, tensor: Tensor) -> torch.dtype:
        """Return the dtype to write; with "stored" it is the widest of the tensor's parts."""
        if self.dtype != _STORED:
            return single_file.TYPES[self.dtype]
        return max(map(self.stored.dtype, tensor.parts), key=lambda dtype: dtype.itemsize)


def write_shards(
    folder: Path, entries: list[Entry], limit: int, read: Callable[[Entry], torch.Tensor]
) -> list[str]:
    """Write ``entries`` to files named as transformers does; returns the names of the files.

    A file has at most ``limit`` bytes of tensors, unless a single tensor is larger. Several files
    have an index. ``read`` is called for one tensor after another, and memory holds only one.
    Raises CheckpointError.
    """
    shards = _in_shards(entries, limit)
    names = _shard_names(len(shards))
    for name, shard in zip(names, shards):
        # Wide dtypes first, so that every tensor is aligned to its element size.
        shard.sort(key=lambda entry: -entry.dtype.itemsize)
        single_file.write(folder / name, shard, read, _METADATA)
    if len(names) == 1:
        return names
    index = {
        "metadata": {"total_size": sum(entry.bytes for entry in entries)},
        "weight_map": {entry.name: name for name, shard in zip(names, shards) for entry in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [*names, INDEX]


def parse_size(text: str) -> int:
    """Return a size in bytes: ``"5GB"`` is 5 * 10^9. Raises ConfigError."""
    unit = text[-2:].upper()
    if unit in _UNITS:
        number = text[:-2]
        factor = _UNITS[unit]
    else:
        number = text
        factor = 1
    try:
        size = int(float(number) * factor)
    except (OverflowError, ValueError):
        size = 0
    if size < 1:
        raise ConfigError(
            f"max_shard_size {text!r} is not a size such as 500MB or 5GB. Set --max-shard-size."
        )
    return size


def _in_shards(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Group consecutive entries into shards of at most ``limit`` bytes."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + entry.bytes > limit:
            shards.append([])
        shards[-1].append(entry)
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
