"""That the tensors in a folder are those of its model: none missing, none over, each of its shape and a known type."""

import torch

from megatron_ring.checkpoint.hugging_face import modules
from megatron_ring.checkpoint.hugging_face.families import Family
from megatron_ring.checkpoint.hugging_face.folder import Folder, Header
from megatron_ring.checkpoint.hugging_face.modules import Tensor
from megatron_ring.checkpoint.tensors import TYPES, Shapes
from megatron_ring.errors import CheckpointError

_HEAD, _EMBEDDING = "lm_head.weight", "embedding.weight"


def matched(folder: Folder, family: Family, shapes: Shapes) -> dict[str, Tensor]:
    """What each tensor in ``folder`` is to a model whose parameters have ``shapes``: every one of ours is in one.

    Raises CheckpointError with everything that does not fit.
    """
    wanted = _named_as_there(folder, family, modules.tensors(family.modules, shapes))
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
