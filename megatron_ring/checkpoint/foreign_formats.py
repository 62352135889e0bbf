"""Recognises the checkpoint formats of other programs by file names, for error messages.

Only the names of the folder itself and of its direct entries are examined. Does not import torch.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ring.checkpoint import names
from megatron_ring.errors import CheckpointError

LITTER = re.compile(
    r"\.DS_Store|\._.*|\.nfs[0-9a-fA-F]+|\.directory|Thumbs\.db|desktop\.ini", re.IGNORECASE
)
"""Files that operating systems and network file systems leave in folders."""

_IMPORT = "Convert it with tools/convert_checkpoint.py import {folder} OUT and use --load OUT."
_BY_HUGGING_FACE = (
    "No tool here reads it. Export it to a Hugging Face folder with {tool}, and convert that with "
    "tools/convert_checkpoint.py import."
)


@dataclass(frozen=True)
class _Format:
    """A checkpoint format: the folder has an entry of ``names`` and, if given, one of ``also``."""

    title: str
    names: re.Pattern
    also: re.Pattern | None
    remedy: str


_FORMATS = (
    _Format(
        "a Hugging Face folder",
        re.compile(
            r"(model|pytorch_model|tf_model|flax_model).*\.(safetensors|bin|h5|msgpack|index\.json)"
        ),
        re.compile(r"config\.json"),
        _IMPORT,
    ),
    _Format(
        "a Hugging Face adapter",
        re.compile(r"adapter_config\.json"),
        None,
        "An adapter is not a complete model: merge it into its base model with peft, save that "
        "with save_pretrained, and convert it with tools/convert_checkpoint.py import.",
    ),
    _Format(
        "a DeepSpeed checkpoint",
        re.compile(
            r"global_step\d+|zero_to_fp32\.py|.*_optim_states\.pt"
            r"|mp_rank_\d+_model_states\.pt|zero_pp_rank_.*"
        ),
        None,
        _BY_HUGGING_FACE.format(tool="DeepSpeed's zero_to_fp32.py and the model's save_pretrained"),
    ),
    _Format(
        "a Megatron checkpoint",
        re.compile(
            r"latest_checkpointed_iteration\.txt|iter_\d{7,}"
            r"|mp_rank_\d{2,3}(_\d{3})*|model_optim_rng\.pt"
        ),
        None,
        _BY_HUGGING_FACE.format(
            tool="Megatron-LM's tools/checkpoint/convert.py or Megatron-Bridge"
        ),
    ),
    _Format(
        "a torch.distributed checkpoint, such as Megatron's torch_dist",
        re.compile(r"\.metadata|.*\.distcp"),
        None,
        _BY_HUGGING_FACE.format(
            tool="the program that wrote it, or Megatron-Bridge for Megatron's"
        ),
    ),
)
_WEIGHTS = re.compile(r".*\.(safetensors|pt|pth|bin|ckpt|gguf|npz|msgpack|h5|nemo)", re.IGNORECASE)
_OWN = re.compile(r"state\.json|tensors\.json|part-\d{5,}\.safetensors")


def check_not_foreign(folder: Path) -> None:
    """Raise CheckpointError if ``folder`` is a file, a foreign checkpoint or an incomplete one."""
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is a file, and checkpoints are folders. Nearest: {folder.absolute().parent}."
        )
    entries = content(folder)
    for known in _FORMATS:
        matching = [name for name in entries if known.names.fullmatch(name)]
        if matching and (known.also is None or any(map(known.also.fullmatch, entries))):
            remedy = known.remedy.replace("{folder}", str(folder))
            raise CheckpointError(f"{folder} is {known.title} ({matching[0]}). {remedy}")
    if own := [name for name in entries if _OWN.fullmatch(name)]:
        raise CheckpointError(
            f"{folder} is a checkpoint that is not whole: it has {own[0]} but no state.json."
        )
    if weights := [name for name in entries if _WEIGHTS.fullmatch(name)]:
        raise CheckpointError(
            f"{folder} holds no checkpoint (a folder named step-NNNNNNNN) but has {weights[0]}. "
            "Export the weights of another program to a Hugging Face folder first, and convert "
            "that with tools/convert_checkpoint.py import."
        )


def within(folder: Path) -> list[Path]:
    """Return the folders directly in ``folder`` that hold checkpoints of this project."""
    paths = (folder / name for name in content(folder))
    return [path for path in paths if path.is_dir() and names.checkpoints(path)]


def content(folder: Path) -> list[str]:
    """Return the names in ``folder``, sorted and without litter; none if it does not exist.

    Raises CheckpointError if it cannot be read.
    """
    try:
        return sorted(path.name for path in folder.iterdir() if not LITTER.fullmatch(path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read the folder {folder}: {error.strerror}.") from error
