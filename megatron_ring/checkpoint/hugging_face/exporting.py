"""A folder that transformers loads, from a checkpoint of ours that any processes wrote."""

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
from megatron_ring.checkpoint.hugging_face.parameters import parameters
from megatron_ring.checkpoint.hugging_face.special_tokens import GENERATION, SpecialTokens
from megatron_ring.checkpoint.hugging_face.tensor_mapping import Module, Tensor
from megatron_ring.checkpoint.locate import Located
from megatron_ring.checkpoint.single_file import Entry
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.checkpoint.tensors import Tensors
from megatron_ring.errors import CheckpointError, ConfigError

STORED = "stored"


@dataclass(frozen=True)
class ExportOptions:
    """How a model is written, whichever it is."""

    family: Literal["", "llama", "mistral", "qwen2", "qwen3", "gpt2"] = ""
    """Whose words describe the model. Empty: the family that it was imported from, else the first that has words for
    all of it."""
    dtype: Literal["stored", "fp32", "bf16", "fp16"] = STORED
    """Type of the weights. stored: what the checkpoint has, which after training is fp32."""
    max_shard_size: str = "5GB"
    """Bytes of tensors that a file has at most; KB, MB and GB are powers of 1000."""
    tokenizer: Path | None = None
    """Folder with the tokenizer's files. None: the checkpoint's own, which only an imported one has."""


@dataclass(frozen=True)
class Exported:
    """What was read and what was written. longest: tokens of a sequence by config.json. carried: the files besides.

    reason: why it is this family. special: the ids that begin and end a text.
    """

    checkpoint: Located
    family: str
    reason: str
    special: SpecialTokens
    dtypes: set[torch.dtype]
    longest: int
    files: list[str]
    carried: list[str]


def export_checkpoint(checkpoint: Path, out: Path, form: ExportOptions) -> Exported:
    """Write ``out``, whole or not at all, from a checkpoint or the newest in a --save folder.

    Raises CheckpointError, and ConfigError for a size that is none.
    """
    limit, located = parse_size(form.max_shard_size), locate.locate(checkpoint)
    _check_empty(out)
    beside = _beside(located.path, form.tokenizer)
    locate.verify(located.path)
    stored = Summary.of(located.path)
    model, vocab_size, seq_length = (
        stored.config.model,
        stored.state.vocab_size,
        stored.state.seq_length,
    )
    stored.tensors.check_shapes(parameters(model, vocab_size, seq_length))
    family, reason = choose_family(
        form.family, model, seq_length, imported_from=_imported_from(located.path)
    )
    special = SpecialTokens.find(beside, stored.state.end_of_document)
    if form.tokenizer:
        special.check_rows(vocab_size)
    weights = Weights.of(stored.tensors, FAMILIES[family].modules, form.dtype)
    entries = weights.entries()
    dtypes = {entry.dtype for entry in entries}
    config = (
        _config(family, vocab_size, max(dtypes, key=lambda dtype: dtype.itemsize)) | special.ids
    )
    config |= write_model(FAMILIES[family], model, seq_length)
    with _whole_or_not(out) as partial:
        files = write_shards(partial, entries, limit, weights.read)
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        carried = copy_beside(beside, partial) if beside else []
        made = (
            [GENERATION]
            if special.write_generation_config(partial) and GENERATION not in carried
            else []
        )
    longest = config[FAMILIES[family].length]
    return Exported(
        located, family, reason, special, dtypes, longest, [CONFIG, *files, *made], carried
    )


def _check_empty(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} is there already. Name a folder that is new, or empty.")


def _beside(checkpoint: Path, asked: Path | None) -> Path | None:
    """The folder that the tokenizer's files come from."""
    if asked is None:
        return checkpoint / CARRIED if (checkpoint / CARRIED).is_dir() else None
    if not any((asked / name).is_file() for name in BESIDE):
        raise CheckpointError(
            f"{asked} has none of {', '.join(BESIDE)}. Set --tokenizer, or leave it out."
        )
    return asked


def _imported_from(checkpoint: Path) -> str:
    """The model_type of the config.json that an imported checkpoint carries; empty where there is none."""
    path = checkpoint / CARRIED / CONFIG
    return str(read_json(path).get("model_type")) if path.is_file() else ""


def _config(family: str, vocab_size: int, dtype: torch.dtype) -> Fields:
    """What config.json has besides the model: transformers before 5 reads torch_dtype, later ones dtype."""
    word = str(dtype).removeprefix("torch.")
    named = {
        "model_type": family,
        "architectures": [FAMILIES[family].architecture],
        "vocab_size": vocab_size,
    }
    return named | {"dtype": word, "torch_dtype": word, "use_cache": True}


@contextlib.contextmanager
def _whole_or_not(out: Path) -> Iterator[Path]:
    """A folder under a hidden name, which becomes ``out`` when all is written, and goes otherwise."""
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
            f"cannot write {out}: {error.strerror}. Give it another name or disk."
        ) from error
    finally:
        disk.delete(partial)


@dataclass(frozen=True)
class Weights:
    """theirs: every tensor that is to be written, by name, and which of ``stored`` it is made of.

    dtype: fp32, bf16, fp16 or stored, which is as they are.
    """

    stored: Tensors
    theirs: dict[str, Tensor]
    dtype: str

    @staticmethod
    def of(stored: Tensors, table: dict[str, Module], dtype: str) -> "Weights":
        """Of all parameters; ``table``: whose modules are whose."""
        return Weights(stored, tensor_mapping.tensors(table, stored.shapes), dtype)

    def entries(self) -> list[Entry]:
        """What there is to be written, layer by layer."""
        return [
            Entry(name, self._type(tensor), tensor.shape) for name, tensor in self.theirs.items()
        ]

    def read(self, entry: Entry) -> torch.Tensor:
        """One of ``entries``, in the type that it has in the checkpoint."""
        tensor = self.theirs[entry.name]
        return tensor.put_together([self.stored.read(name) for name in tensor.parts])

    def _type(self, tensor: Tensor) -> torch.dtype:
        """The widest of its parts where it has several."""
        if self.dtype != STORED:
            return single_file.TYPES[self.dtype]
        return max(map(self.stored.dtype, tensor.parts), key=lambda dtype: dtype.itemsize)


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
