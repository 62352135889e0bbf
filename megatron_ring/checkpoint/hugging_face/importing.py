"""Import of a transformers folder as a checkpoint of step 0, with weights only, in their dtypes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ring.checkpoint import foreign_formats, lease, names, store
from megatron_ring.checkpoint.finite import check_finite
from megatron_ring.checkpoint.hugging_face import folder as hugging_face
from megatron_ring.checkpoint.hugging_face import tensor_mapping, unsupported
from megatron_ring.checkpoint.hugging_face.families import FAMILIES, Family, read_model
from megatron_ring.checkpoint.hugging_face.folder import Folder, Header
from megatron_ring.checkpoint.hugging_face.key_mappings import invalid_sizes
from megatron_ring.checkpoint.hugging_face.rope_parameters import rope_config, unread_parameters
from megatron_ring.checkpoint.hugging_face.stretch import Stretch, stretched
from megatron_ring.checkpoint.hugging_face.tensor_mapping import Tensor
from megatron_ring.checkpoint.provenance import commit, now
from megatron_ring.checkpoint.state import RunState
from megatron_ring.checkpoint.tensors import TYPES, Shapes, write_whole
from megatron_ring.config import Config
from megatron_ring.errors import CheckpointError, ConfigError
from megatron_ring.model.shapes import parameter_shapes
from megatron_ring.untrusted import shown

_MAX_NOTES = 20
_HEAD = "lm_head.weight"
_EMBEDDING = "embedding.weight"


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    path: the checkpoint. carried: the files copied into it. dropouts: options of config.json that
    are dropped because the models here have no dropout. notes: sentences on other content of
    config.json that is ignored, as transformers does.
    """

    path: Path
    family: str
    carried: list[str]
    dropouts: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Source:
    """A transformers folder as a model of ours; of its tensors only the headers have been read.

    config: of a run from this model. shapes: of our parameters. mapped: which of our parameters
    each tensor in the folder holds.
    """

    folder: Folder
    family: str
    config: Config
    vocab_size: int
    shapes: Shapes
    mapped: dict[str, Tensor]

    @staticmethod
    def open(path: Path, stretch: Stretch) -> "Source":
        """Read everything but the tensors.

        Raises CheckpointError, and ConfigError for an invalid ``stretch`` or a config that --load
        would refuse.
        """
        folder = Folder.open(path)
        name, family = _family(folder)
        config, vocab_size = _config(folder, family, stretch)
        shapes = parameter_shapes(config.model, vocab_size, config.data.seq_length)
        mapped = _map_tensors(folder, family, shapes)
        return Source(folder, name, config, vocab_size, shapes, mapped)

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield our parameters by name, whole, reading one of their tensors at a time.

        Memory holds only what the caller keeps. Raises NonFiniteTensor.
        """
        for name, tensor in self.mapped.items():
            values = self.folder.read(name)
            check_finite(values, f"{name} in {self.folder.headers[name].file}")
            yield from tensor.split(values)


def import_folder(source: Path, out: Path, stretch: Stretch) -> Imported:
    """Write the checkpoint of step 0 into ``out``, which becomes a folder for --load.

    Raises CheckpointError, and ConfigError for an invalid ``stretch`` or a config that --load
    would refuse.
    """
    _check_not_own_checkpoint(source)
    _check_empty(out)
    opened = Source.open(source, stretch)
    state = RunState(
        step=0,
        consumed_samples=0,
        vocab_size=opened.vocab_size,
        seq_length=opened.config.data.seq_length,
        commit=commit(),
        written_at=now(),
    )
    dropouts = _dropouts(opened.folder.config)
    notes = _notes(opened.folder.config, FAMILIES[opened.family])
    path, carried = _write(opened, out, state)
    return Imported(path, opened.family, carried, dropouts, notes)


def _check_not_own_checkpoint(source: Path) -> None:
    """Refuse a checkpoint of this project, or a folder of them, as the source of an import."""
    if not source.is_dir() or (source / hugging_face.CONFIG).exists():
        return
    if (source / store.STATE).is_file() or names.checkpoints(source):
        raise CheckpointError(
            f"{source} is already a checkpoint of this project, or a folder of them, and needs no "
            f"import. Train it with pretrain_gpt.py --load {source}."
        )


def _check_empty(out: Path) -> None:
    """Refuse a folder with content.

    The remainder of a killed import, the lease of a run and files of operating systems are ignored.
    """
    entries = foreign_formats.content(out) if out.is_dir() else []
    others = [name for name in entries if not name.startswith((names.PARTIAL, names.LEASE))]
    if others:
        raise CheckpointError(f"{out} already exists and has {others[0]}. Set a new folder.")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} already exists. Set a new folder.")
    lease.check_not_held(out)


def _family(folder: Folder) -> tuple[str, Family]:
    name = folder.config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            f"{folder.path / hugging_face.CONFIG} has model_type {shown(name)}, which is not "
            f"supported. {unsupported.describe(folder.config)}"
        )
    return name, FAMILIES[name]


def _config(folder: Folder, family: Family, stretch: Stretch) -> tuple[Config, int]:
    """Return the config for a run from this model, and its vocab_size."""
    path = folder.path / hugging_face.CONFIG
    model, problems = read_model(family, folder.config)
    if problems := invalid_sizes(folder.config, "vocab_size", family.length) + problems:
        raise CheckpointError([f"{path} describes a model that is not supported:", *problems])
    if model.num_layers > len(folder.headers):
        raise CheckpointError(
            f"{path} describes {model.num_layers} layers, and the folder has "
            f"{len(folder.headers)} tensors, fewer than one for each."
        )
    vocab_size = folder.config["vocab_size"]
    longest = folder.config[family.length]
    model, seq_length = stretched(model, folder.config, longest, stretch)
    # A tokenizer may have fewer ids than the model has rows.
    config = Config(model=replace(model, padded_vocab_size=vocab_size))
    config = replace(config, data=replace(config.data, seq_length=seq_length))
    if problems := config.problems():
        raise ConfigError(["--load would refuse the config of the checkpoint:", *problems])
    return config, vocab_size


# ---- the tensors in the folder and those of the model ----


def _map_tensors(folder: Folder, family: Family, shapes: Shapes) -> dict[str, Tensor]:
    """Return, for each tensor in ``folder``, which parameters of the model it holds.

    ``shapes`` are those of the parameters, each of which is in exactly one tensor. Raises
    CheckpointError with everything that is missing, unexpected, or of another shape or dtype.
    """
    wanted = _with_names_of_folder(folder, family, tensor_mapping.tensors(family.modules, shapes))
    headers = {
        name: header for name, header in folder.headers.items() if not name.endswith(family.buffers)
    }
    problems = [f"{name} is missing." for name in wanted if name not in headers]
    for name, tensor in wanted.items():
        if name in headers:
            problems += _header_problems(name, headers[name], tensor)
    for name in headers:
        if name not in wanted:
            problems += _left_over_problems(folder, name, wanted)
    if problems:
        raise CheckpointError(
            [f"the tensors in {folder.path} do not match its config.json:", *problems]
        )
    return wanted


def _with_names_of_folder(
    folder: Folder, family: Family, wanted: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Drop the base model's prefix from the names if the folder does not use it.

    Some folders, including the first GPT-2, were saved from the model without its head.
    """
    if any(name.startswith(family.prefix) for name in folder.headers):
        return wanted
    return {name.removeprefix(family.prefix): tensor for name, tensor in wanted.items()}


def _header_problems(name: str, header: Header, wanted: Tensor) -> list[str]:
    problems = []
    if header.shape != wanted.shape:
        problems.append(
            f"{name} has shape {list(header.shape)}, and must have {list(wanted.shape)}."
        )
    if header.dtype not in TYPES:
        problems.append(f"{name} has dtype {header.dtype}, and must have {', '.join(TYPES)}.")
    return problems


def _left_over_problems(folder: Folder, name: str, wanted: dict[str, Tensor]) -> list[str]:
    """Return what is wrong with a tensor that the model does not have.

    A second copy of the embedding is allowed as the tied head.
    """
    embedding = next(theirs for theirs, tensor in wanted.items() if _EMBEDDING in tensor.parts)
    if name != _HEAD or embedding not in folder.headers:
        return [f"{name} is not a tensor of the model."]
    if torch.equal(folder.read(name), folder.read(embedding)):
        return []
    return [
        f"{name} differs from {embedding}, but tie_word_embeddings is true. "
        "Set it to false in config.json to import both."
    ]


# ---- writing ----


def _write(source: Source, out: Path, state: RunState) -> tuple[Path, list[str]]:
    store.prepare(out, state.step)
    partial = out / names.partial_name(state.step)
    try:
        write_whole(partial, source.shapes, source.parameters())
        carried = _carry(source.folder.path, partial / hugging_face.CARRIED)
        records = store.flush_and_checksum(out, state.step, store.written(out, state.step))
        return store.commit(out, state, source.config, records), carried
    except (CheckpointError, OSError) as error:
        raise CheckpointError(
            f"{source.folder.path} was not imported to {out}: {error}."
        ) from error
    finally:
        store.discard(out, state.step)


def _carry(source: Path, target: Path) -> list[str]:
    """Copy config.json and the files beside the model; returns the names of the latter."""
    target.mkdir()
    hugging_face.copy(source, target, hugging_face.CONFIG)
    return hugging_face.copy_beside(source, target)


def _notes(config: dict, family: Family) -> list[str]:
    """Return a sentence on each key of config.json that looks relevant but has no effect."""
    notes = [
        f"RoPE's {shown(name)[1:-1]} {shown(rope_config(config)[name])} is not used: "
        "transformers does not read it either."
        for name in unread_parameters(config)[:_MAX_NOTES]
    ]
    if config.get("auto_map"):
        notes.append(
            "auto_map refers to custom code, which is not run: the model is read as transformers' "
            f"{family.architecture}, as transformers does without trust_remote_code."
        )
    return notes


def _dropouts(config: dict) -> list[str]:
    keys = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop")
    return [f"{key} {shown(config[key])}" for key in keys if config.get(key)]
