"""Folders written by transformers' save_pretrained: config.json, safetensors files, tokenizer."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_ring.errors import CheckpointError
from megatron_ring.untrusted import (
    TOKENIZER_BYTES,
    check_link,
    check_regular,
    create,
    errors_as,
    parse_json_object,
    path_inside,
    read_bytes,
    validate,
)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
BESIDE = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files of a model besides its weights and config, which are copied unchanged."""

_JSON_SETTINGS = {
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
}
_REMEDY = "Use another folder, or write this one again with transformers' save_pretrained."

CARRIED = "hugging_face"
"""The folder in an imported checkpoint for these files and the original config.json."""


@dataclass(frozen=True)
class Header:
    """The header of a tensor in a file. dtype: safetensors' name, such as F32."""

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Folder:
    """A folder of a model. config: config.json. headers: of every tensor, by name."""

    path: Path
    config: dict[str, Any]
    headers: dict[str, Header]

    @staticmethod
    def open(path: Path) -> "Folder":
        """Read everything but the tensors. Raises CheckpointError if anything is missing."""
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is not a folder. Use one that transformers' save_pretrained has written."
            )
        if (path / ADAPTER).is_file():
            raise CheckpointError(
                f"{path} holds an adapter ({ADAPTER}), whose weights are added to those of another "
                "model. Merge them with peft's merge_and_unload, and write the model again with "
                "save_pretrained."
            )
        return Folder(path, read_json(path / CONFIG), _headers(path))

    def read(self, name: str) -> torch.Tensor:
        """Return a memory-mapped tensor.

        The file is opened for it alone, because mapped memory counts until the file is closed.
        """
        return _tensor(self.path, self.headers[name].file, name)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises CheckpointError if ``path`` has none."""
    with errors_as(CheckpointError, path, _REMEDY):
        check_link(path.parent, path)
        return parse_json_object(read_bytes(path))


def copy_beside(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files and generation_config.json, if present; returns their names.

    Raises CheckpointError for an entry that is neither a regular file in ``source`` nor a link
    within it, for a file that is too large, and for settings that are not a JSON object.
    """
    names = [name for name in BESIDE if os.path.lexists(source / name)]
    for name in names:
        if name in _JSON_SETTINGS:
            read_json(source / name)
        copy(source, target, name)
    return names


def copy(source: Path, target: Path, name: str) -> None:
    """Copy the file ``name`` to another folder. Raises CheckpointError as ``copy_beside`` does."""
    with errors_as(CheckpointError, source / name, _REMEDY):
        check_link(source, source / name)
        content = read_bytes(source / name, TOKENIZER_BYTES)
    with create(target / name) as file:
        file.write(content)


def _headers(path: Path) -> dict[str, Header]:
    if os.path.lexists(path / INDEX):
        indexed = _indexed(path)
        if os.path.lexists(path / WEIGHTS):
            _check_same_weights(path, indexed, dict(_headers_of(path, WEIGHTS)))
        return indexed
    if os.path.lexists(path / WEIGHTS):
        return dict(_headers_of(path, WEIGHTS))
    pickled = [file.name for file in path.glob("pytorch_model*.bin")]
    reason = (
        f", but {pickled[0]}: only safetensors files, which run no code, are read"
        if pickled
        else ""
    )
    raise CheckpointError(
        f"{path} has neither {WEIGHTS} nor {INDEX}{reason}. Load it with transformers and write "
        "it again with save_pretrained."
    )


def _indexed(path: Path) -> dict[str, Header]:
    """Return the headers of the tensors in the files that the index lists.

    Raises CheckpointError unless those files have exactly the tensors that the index says.
    """
    with errors_as(CheckpointError, path / INDEX, _REMEDY):
        document = {"weight_map": read_json(path / INDEX).get("weight_map")}
        file_of = validate(document, dict[str, dict[str, str]])["weight_map"]
        for file in set(file_of.values()):
            path_inside(path, file)
    headers = {
        (name, file): header
        for file in sorted(set(file_of.values()))
        for name, header in _headers_of(path, file)
    }
    if headers.keys() != file_of.items():
        differing = sorted({name for name, _ in headers.keys() ^ file_of.items()})
        raise CheckpointError(
            f"{path / INDEX} and the files that it names do not have the same tensors: "
            f"{', '.join(differing[:3])}."
        )
    return {name: header for (name, _), header in headers.items()}


def _check_same_weights(path: Path, indexed: dict[str, Header], single: dict[str, Header]) -> None:
    """Refuse a folder whose single file and whose index hold different weights.

    Programs differ in which of the two they read. Compares bytes, one tensor at a time. Raises
    CheckpointError with the first tensors that differ.
    """
    names = sorted(indexed.keys() | single.keys())
    differing = (
        name for name in names if not _is_same(path, name, indexed.get(name), single.get(name))
    )
    if first := list(itertools.islice(differing, 3)):
        raise CheckpointError(
            f"{path} has both {WEIGHTS} and {INDEX}, and they do not hold the same weights "
            f"({', '.join(first)}): transformers would read {WEIGHTS}. Move one of them out of the "
            f"folder: {WEIGHTS}, or {INDEX} with the files that it names."
        )


def _is_same(path: Path, name: str, indexed: Header | None, single: Header | None) -> bool:
    if indexed is None or single is None:
        return False
    if (indexed.shape, indexed.dtype) != (single.shape, single.dtype):
        return False
    if indexed.file == single.file:
        return True
    return torch.equal(_bytes(path, indexed.file, name), _bytes(path, single.file, name))


def _bytes(path: Path, file: str, name: str) -> torch.Tensor:
    return _tensor(path, file, name).flatten().view(torch.uint8)


def _tensor(path: Path, file: str, name: str) -> torch.Tensor:
    with _opened(path, file) as opened:
        return opened.get_tensor(name)


def _headers_of(path: Path, file: str) -> Iterator[tuple[str, Header]]:
    with _opened(path, file) as opened:
        for name in opened.keys():  # noqa: SIM118 (a safe_open is not a dict)
            tensor = opened.get_slice(name)
            yield name, Header(file, tuple(tensor.get_shape()), tensor.get_dtype())


@contextlib.contextmanager
def _opened(folder: Path, file: str) -> Iterator[Any]:
    """Open a safetensors file of ``folder``.

    Raises CheckpointError if it is not in the folder or cannot be read.
    """
    path = folder / file
    with errors_as(CheckpointError, path, _REMEDY):
        check_link(folder, path)
        check_regular(path)
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {_REMEDY}") from error
