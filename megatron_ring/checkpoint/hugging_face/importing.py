"""A checkpoint of ours from a folder of transformers': weights alone, in the types that they have, at step 0."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ring.checkpoint import formats, lease, names, store
from megatron_ring.checkpoint.finite import check_finite
from megatron_ring.checkpoint.hugging_face import folder as hugging_face
from megatron_ring.checkpoint.hugging_face import tensor_mapping, unsupported
from megatron_ring.checkpoint.hugging_face.families import FAMILIES, Family, read_model
from megatron_ring.checkpoint.hugging_face.folder import Folder, Header
from megatron_ring.checkpoint.hugging_face.key_mappings import missing_sizes
from megatron_ring.checkpoint.hugging_face.parameters import parameters
from megatron_ring.checkpoint.hugging_face.rope_parameters import config_of_rope, unread_parameters
from megatron_ring.checkpoint.hugging_face.stretch import Stretch, stretched
from megatron_ring.checkpoint.hugging_face.tensor_mapping import Tensor
from megatron_ring.checkpoint.provenance import commit, now
from megatron_ring.checkpoint.state import RunState
from megatron_ring.checkpoint.tensors import TYPES, Shapes, write_whole
from megatron_ring.config import Config
from megatron_ring.errors import CheckpointError, ConfigError
from megatron_ring.untrusted import shown

_NOTED = 20


@dataclass(frozen=True)
class Imported:
    """path: the checkpoint. carried: what is in it besides the model. dropouts: what training leaves out.

    notes: sentences on what config.json has and an import passes over, as transformers does.
    """

    path: Path
    family: str
    carried: list[str]
    dropouts: list[str]
    notes: list[str]


def import_folder(source: Path, out: Path, stretch: Stretch) -> Imported:
    """Write the checkpoint of step 0 into ``out``, which becomes a folder for --load.

    Raises CheckpointError, and ConfigError for a stretch that cannot be, or a config that --load would refuse.
    """
    _check_not_ours(source)
    _check_empty(out)
    folder = Folder.open(source)
    name, family = _family(folder)
    config, vocab_size = _config(folder, family, stretch)
    shapes = parameters(config.model, vocab_size, config.data.seq_length)
    found = matched(folder, family, shapes)
    state = RunState(
        step=0,
        consumed_samples=0,
        vocab_size=vocab_size,
        seq_length=config.data.seq_length,
        commit=commit(),
        written_at=now(),
    )
    dropouts, notes = _dropouts(folder.config), _notes(folder.config, family)
    path, carried = _write(folder, out, state, config, shapes, found)
    return Imported(path, name, carried, dropouts, notes)


def _check_not_ours(source: Path) -> None:
    """Refuse a checkpoint of this project, or a folder of them, in the place of one of transformers'."""
    if not source.is_dir() or (source / hugging_face.CONFIG).exists():
        return
    if (source / store.STATE).is_file() or names.checkpoints(source):
        raise CheckpointError(
            f"{source} is already a checkpoint of this project, or a folder of them: there is nothing to import. "
            f"Train it with pretrain_gpt.py --load {source}."
        )


def _check_empty(out: Path) -> None:
    """Refuse a folder with content.

    What a killed import has left, the lease of a run and files of operating systems do not count.
    """
    ignored = (names.PARTIAL, names.LEASE)
    others = (
        [name for name in formats.content(out) if not name.startswith(ignored)]
        if out.is_dir()
        else []
    )
    if others or (out.exists() and not out.is_dir()):
        raise CheckpointError(
            f"{out} is there already{f', and has {others[0]}' if others else ''}. Name a new folder."
        )
    lease.check_not_held(out)


def _family(folder: Folder) -> tuple[str, Family]:
    name = folder.config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            f"{folder.path / hugging_face.CONFIG} is of model_type {shown(name)}, which is not read. "
            f"{unsupported.described(folder.config)}"
        )
    return name, FAMILIES[name]


def _config(folder: Folder, family: Family, stretch: Stretch) -> tuple[Config, int]:
    """The config of a run from this model, and its vocab_size."""
    model, problems = read_model(family, folder.config)
    if problems := missing_sizes(folder.config, "vocab_size", family.length) + problems:
        path = folder.path / hugging_face.CONFIG
        raise CheckpointError(
            [f"{path} describes a model that cannot be said exactly here:", *problems]
        )
    if model.num_layers > len(folder.headers):
        raise CheckpointError(
            f"{folder.path / hugging_face.CONFIG} describes {model.num_layers} layers, and the folder has "
            f"{len(folder.headers)} tensors, fewer than one for each."
        )
    vocab_size, longest = folder.config["vocab_size"], folder.config[family.length]
    model, seq_length = stretched(model, folder.config, longest, stretch)
    # A tokenizer may have fewer ids than the model has rows.
    config = Config(model=replace(model, padded_vocab_size=vocab_size))
    config = replace(config, data=replace(config.data, seq_length=seq_length))
    if problems := config.problems():
        raise ConfigError(
            ["the config of the checkpoint would be one that --load refuses:", *problems]
        )
    return config, vocab_size


def _write(
    folder: Folder,
    out: Path,
    state: RunState,
    config: Config,
    shapes: Shapes,
    found: dict[str, Tensor],
) -> tuple[Path, list[str]]:
    store.prepare(out, state.step)
    partial = out / names.partial_name(state.step)
    try:
        write_whole(partial, shapes, _taken_apart(folder, found))
        carried = _carry(folder.path, partial / hugging_face.CARRIED)
        sealed = store.seal(out, state.step, store.written(out, state.step))
        return store.commit(out, state, config, sealed), carried
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{folder.path} was not imported to {out}: {error}.") from error
    finally:
        store.discard(out, state.step)


def _carry(source: Path, target: Path) -> list[str]:
    target.mkdir()
    hugging_face.copy(source, target, hugging_face.CONFIG)
    return hugging_face.copy_beside(source, target)


def _taken_apart(folder: Folder, found: dict[str, Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Our parameters, from one of their tensors after the other: memory holds what its caller holds."""
    for name, tensor in found.items():
        values = folder.read(name)
        check_finite(values, f"{name} in {folder.headers[name].file}")
        yield from tensor.split(values)


def _notes(config: dict, family: Family) -> list[str]:
    """One sentence on each thing in config.json that changes nothing, though its name may make one expect it."""
    found = [
        f"RoPE's {shown(name)[1:-1]} {shown(config_of_rope(config)[name])} is not used: "
        "transformers does not read it either."
        for name in unread_parameters(config)[:_NOTED]
    ]
    if config.get("auto_map"):
        found.append(
            "auto_map names code of the model's own, which is not run: the model is read as transformers' own "
            f"{family.architecture}, as transformers does without trust_remote_code."
        )
    return found


def _dropouts(config: dict) -> list[str]:
    names = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop")
    return [f"{name} {shown(config[name])}" for name in names if config.get(name)]


_HEAD, _EMBEDDING = "lm_head.weight", "embedding.weight"


def matched(folder: Folder, family: Family, shapes: Shapes) -> dict[str, Tensor]:
    """What each tensor in ``folder`` is to a model whose parameters have ``shapes``: every one of ours is in one.

    Raises CheckpointError with everything that does not fit.
    """
    wanted = _named_as_there(folder, family, tensor_mapping.tensors(family.modules, shapes))
    found = {
        name: header for name, header in folder.headers.items() if not name.endswith(family.buffers)
    }
    problems = [f"{name} is missing." for name in wanted if name not in found]
    problems += [
        problem
        for name in wanted
        if name in found
        for problem in _misfits(name, found[name], wanted[name])
    ]
    problems += [_left_over(folder, name, wanted) for name in found if name not in wanted]
    if problems := [problem for problem in problems if problem]:
        raise CheckpointError(
            [f"the tensors in {folder.path} are not those of its config.json:", *problems]
        )
    return wanted


def _named_as_there(folder: Folder, family: Family, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some folders, the first GPT-2 among them, were saved from the model without its head, and name nothing for it."""
    if any(name.startswith(family.prefix) for name in folder.headers):
        return wanted
    return {name.removeprefix(family.prefix): tensor for name, tensor in wanted.items()}


def _misfits(name: str, header: Header, wanted: Tensor) -> list[str]:
    found = []
    if header.shape != wanted.shape:
        found.append(f"{name} has shape {list(header.shape)}, and must have {list(wanted.shape)}.")
    if header.dtype not in TYPES:
        found.append(f"{name} is of type {header.dtype}, and must be of {', '.join(TYPES)}.")
    return found


def _left_over(folder: Folder, name: str, wanted: dict[str, Tensor]) -> str:
    """What is wrong with a tensor that the model has no place for. A tied head may be written a second time."""
    tied = [theirs for theirs, tensor in wanted.items() if _EMBEDDING in tensor.parts]
    if name != _HEAD or tied[0] not in folder.headers:
        return f"{name} has no place in the model."
    if torch.equal(folder.read(name), folder.read(tied[0])):
        return ""
    return f"{name} is not {tied[0]}, but tie_word_embeddings is true. Set it to false in config.json to have both."
