"""A folder that transformers loads, from a checkpoint of ours that any processes wrote."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_ring.checkpoint import disk, locate
from megatron_ring.checkpoint.hugging_face.aspects import Fields
from megatron_ring.checkpoint.hugging_face.express import choose_family, write_model
from megatron_ring.checkpoint.hugging_face.families import FAMILIES
from megatron_ring.checkpoint.hugging_face.folder import (
    BESIDE,
    CARRIED,
    CONFIG,
    copy_beside,
    read_json,
)
from megatron_ring.checkpoint.hugging_face.parameters import parameters
from megatron_ring.checkpoint.hugging_face.shards import parse_size, write_shards
from megatron_ring.checkpoint.hugging_face.special_tokens import GENERATION, SpecialTokens
from megatron_ring.checkpoint.hugging_face.weights import STORED, Weights
from megatron_ring.checkpoint.locate import Located
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.errors import CheckpointError


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
