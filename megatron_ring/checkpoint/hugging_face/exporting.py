"""A folder that transformers loads, from a checkpoint of ours that any processes wrote."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_ring.checkpoint import disk, locate
from megatron_ring.checkpoint.hugging_face.aspects import Told
from megatron_ring.checkpoint.hugging_face.express import choose_family, write_model
from megatron_ring.checkpoint.hugging_face.families import FAMILIES
from megatron_ring.checkpoint.hugging_face.folder import BESIDE, CARRIED, CONFIG, copy_beside, read_json
from megatron_ring.checkpoint.hugging_face.parameters import parameters
from megatron_ring.checkpoint.hugging_face.shards import parse_size, write_shards
from megatron_ring.checkpoint.hugging_face.weights import STORED, Weights
from megatron_ring.checkpoint.locate import Located
from megatron_ring.checkpoint.summary import Summary
from megatron_ring.errors import CheckpointError


@dataclass(frozen=True)
class Form:
    """How a model is written, whichever it is."""

    family: Literal["", "llama", "mistral", "qwen2", "qwen3", "gpt2"] = ""
    """Whose words describe the model. Empty: those of the only family that has words for all of it."""
    dtype: Literal["stored", "fp32", "bf16", "fp16"] = STORED
    """Type of the weights. stored: what the checkpoint has, which after training is fp32."""
    max_shard_size: str = "5GB"
    """Bytes of tensors that a file has at most; KB, MB and GB are powers of 1000."""
    tokenizer: Path | None = None
    """Folder with the tokenizer's files. None: the checkpoint's own, which only an imported one has."""


@dataclass(frozen=True)
class Exported:
    """What was read and what was written. longest: tokens of a sequence by config.json. carried: the files besides."""

    checkpoint: Located
    family: str
    dtypes: set[torch.dtype]
    longest: int
    files: list[str]
    carried: list[str]


def export_checkpoint(checkpoint: Path, out: Path, form: Form) -> Exported:
    """Write ``out``, whole or not at all, from a checkpoint or the newest in a --save folder.

    Raises CheckpointError, and ConfigError for a size that is none.
    """
    limit, located = parse_size(form.max_shard_size), locate.locate(checkpoint)
    _check_empty(out)
    beside = _beside(located.path, form.tokenizer)
    locate.verify(located.path)
    stored = Summary.of(located.path)
    model, vocab_size, seq_length = stored.config.model, stored.state.vocab_size, stored.state.seq_length
    stored.tensors.check_shapes(parameters(model, vocab_size, seq_length))
    family = choose_family(form.family, model, seq_length)
    weights = Weights.of(stored.tensors, FAMILIES[family].modules, form.dtype)
    entries = weights.entries()
    dtypes = {entry.dtype for entry in entries}
    config = _config(family, vocab_size, max(dtypes, key=lambda dtype: dtype.itemsize), beside)
    config |= write_model(FAMILIES[family], model, seq_length)
    with _whole_or_not(out) as partial:
        files = write_shards(partial, entries, limit, weights.read)
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        carried = copy_beside(beside, partial) if beside else []
    return Exported(located, family, dtypes, config[FAMILIES[family].length], [CONFIG, *files], carried)


def _check_empty(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} is there already. Name a folder that is new, or empty.")


def _beside(checkpoint: Path, asked: Path | None) -> Path | None:
    """The folder that the tokenizer's files come from."""
    if asked is None:
        return checkpoint / CARRIED if (checkpoint / CARRIED).is_dir() else None
    if not any((asked / name).is_file() for name in BESIDE):
        raise CheckpointError(f"{asked} has none of {', '.join(BESIDE)}. Set --tokenizer, or leave it out.")
    return asked


def _config(family: str, vocab_size: int, dtype: torch.dtype, source: Path | None) -> Told:
    """What config.json has besides the model: transformers before 5 reads torch_dtype, later ones dtype."""
    word = str(dtype).removeprefix("torch.")
    named = {"model_type": family, "architectures": [FAMILIES[family].architecture], "vocab_size": vocab_size}
    return named | {"dtype": word, "torch_dtype": word, "use_cache": True} | _special_tokens(source)


def _special_tokens(source: Path | None) -> Told:
    """As the config.json beside the tokenizer has them; null, not a family's own ids, where there is none."""
    told = read_json(source / CONFIG) if source and (source / CONFIG).is_file() else {}
    return {key: told.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


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
        raise CheckpointError(f"cannot write {out}: {error.strerror}. Give it another name or disk.") from error
    finally:
        disk.delete(partial)
