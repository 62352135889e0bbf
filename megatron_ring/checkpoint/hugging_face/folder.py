"""A folder as transformers' save_pretrained leaves it: config.json, safetensors files and their index, a tokenizer."""

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

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
BESIDE = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""What belongs to a model besides its weights and its config, and is carried along as it is."""

_SETTINGS = {
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
}
_REMEDY = "Give another folder, or write this one again with transformers' save_pretrained."

CARRIED = "hugging_face"
"""The folder in an imported checkpoint that has these, and config.json as it was."""


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor. dtype: safetensors' word, F32 for example."""

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Folder:
    """config: config.json. headers: of every tensor, by name."""

    path: Path
    config: dict[str, Any]
    headers: dict[str, Header]

    @staticmethod
    def open(path: Path) -> "Folder":
        """Read everything but the tensors. Raises CheckpointError where it is not whole."""
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is not a folder. Give one that transformers' save_pretrained has written."
            )
        if (path / ADAPTER).is_file():
            raise CheckpointError(
                f"{path} holds an adapter ({ADAPTER}), whose weights are added to those of another model. Merge them "
                "with peft's merge_and_unload, and write the model again with save_pretrained."
            )
        return Folder(path, read_json(path / CONFIG), _headers(path))

    def read(self, name: str) -> torch.Tensor:
        """A tensor, mapped into memory. The file is opened for it alone: what is mapped counts until it is closed."""
        return _tensor(self.path, self.headers[name].file, name)


def read_json(path: Path) -> dict[str, Any]:
    """Return an object of keys and values. Raises CheckpointError where ``path`` is not one."""
    with errors_as(CheckpointError, path, _REMEDY):
        check_link(path.parent, path)
        return parse_json_object(read_bytes(path))


def copy_beside(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files and generation_config.json, as far as they are there; returns their names.

    Raises CheckpointError for what is not a regular file in ``source`` or a link within it, for one that is too large,
    and for settings that are not a JSON object.
    """
    names = [name for name in BESIDE if os.path.lexists(source / name)]
    for name in names:
        if name in _SETTINGS:
            read_json(source / name)
        copy(source, target, name)
    return names


def copy(source: Path, target: Path, name: str) -> None:
    """Copy the file ``name`` from one folder to another. Raises CheckpointError as ``copy_beside``."""
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
    pickled = [found.name for found in path.glob("pytorch_model*.bin")]
    raise CheckpointError(
        f"{path} has neither {WEIGHTS} nor {INDEX}"
        + (
            f", but {pickled[0]}: only safetensors are read, which run no code. "
            if pickled
            else ". "
        )
        + "Load it with transformers and write it again with save_pretrained."
    )


def _indexed(path: Path) -> dict[str, Header]:
    with errors_as(CheckpointError, path / INDEX, _REMEDY):
        found = {"weight_map": read_json(path / INDEX).get("weight_map")}
        index = validate(found, dict[str, dict[str, str]])["weight_map"]
        for file in set(index.values()):
            path_inside(path, file)
    found = {
        (name, file): header
        for file in sorted(set(index.values()))
        for name, header in _headers_of(path, file)
    }
    if found.keys() != index.items():
        differing = ", ".join(sorted({name for name, _ in found.keys() ^ index.items()})[:3])
        raise CheckpointError(
            f"{path / INDEX} and the files that it names do not have the same tensors: {differing}."
        )
    return {name: header for (name, _), header in found.items()}


def _check_same_weights(path: Path, indexed: dict[str, Header], single: dict[str, Header]) -> None:
    """Refuse a folder whose single file and whose index are two models: readers differ in which they take.

    Compares bytes, one tensor at a time. Raises CheckpointError with the first tensors that differ.
    """
    names = sorted(indexed.keys() | single.keys())
    differing = (
        name for name in names if not _is_same(path, name, indexed.get(name), single.get(name))
    )
    if first := list(itertools.islice(differing, 3)):
        raise CheckpointError(
            f"{path} has both {WEIGHTS} and {INDEX}, and they do not hold the same weights ({', '.join(first)}): "
            f"transformers would take {WEIGHTS}. Move one of them out of the folder: {WEIGHTS}, or {INDEX} with the "
            "files that it names."
        )


def _is_same(path: Path, name: str, indexed: Header | None, single: Header | None) -> bool:
    if (
        indexed is None
        or single is None
        or (indexed.shape, indexed.dtype) != (single.shape, single.dtype)
    ):
        return False
    if indexed.file == single.file:
        return True
    one, other = (_tensor(path, header.file, name).flatten() for header in (indexed, single))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _tensor(path: Path, file: str, name: str) -> torch.Tensor:
    with _opened(path, file) as opened:
        return opened.get_tensor(name)


def _headers_of(path: Path, file: str) -> Iterator[tuple[str, Header]]:
    with _opened(path, file) as opened:
        for name in opened.keys():  # noqa: SIM118 (a safe_open is no dict)
            tensor = opened.get_slice(name)
            yield name, Header(file, tuple(tensor.get_shape()), tensor.get_dtype())


@contextlib.contextmanager
def _opened(folder: Path, file: str) -> Iterator[Any]:
    """Open a safetensors file of ``folder``. Raises CheckpointError where it cannot be read or is not in there."""
    path = folder / file
    with errors_as(CheckpointError, path, _REMEDY):
        check_link(folder, path)
        check_regular(path)
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {_REMEDY}") from error
