"""A folder as transformers' save_pretrained leaves it: config.json, safetensors files and their index, a tokenizer."""

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_ring.errors import CheckpointError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
BESIDE = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""What belongs to a model besides its weights and its config, and is carried along as it is."""

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
            raise CheckpointError(f"{path} is not a folder. Give one that transformers' save_pretrained has written.")
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
    """An object of keys and values. Raises CheckpointError where ``path`` is not one."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds no keys and values.")
    return document


def copy_beside(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files and generation_config.json, as far as they are there; returns their names."""
    names = [name for name in BESIDE if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def _headers(path: Path) -> dict[str, Header]:
    if (path / INDEX).is_file():
        indexed = _indexed(path)
        if (path / WEIGHTS).is_file():
            _check_same_weights(path, indexed, dict(_headers_of(path, WEIGHTS)))
        return indexed
    if (path / WEIGHTS).is_file():
        return dict(_headers_of(path, WEIGHTS))
    pickled = [found.name for found in path.glob("pytorch_model*.bin")]
    raise CheckpointError(
        f"{path} has neither {WEIGHTS} nor {INDEX}"
        + (f", but {pickled[0]}: only safetensors are read, which run no code. " if pickled else ". ")
        + "Load it with transformers and write it again with save_pretrained."
    )


def _indexed(path: Path) -> dict[str, Header]:
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise CheckpointError(f"{path / INDEX} has no weight_map of names to files.")
    found = {(name, file): header for file in sorted(set(index.values())) for name, header in _headers_of(path, file)}
    if found.keys() != index.items():
        differing = ", ".join(sorted({name for name, _ in found.keys() ^ index.items()})[:3])
        raise CheckpointError(f"{path / INDEX} and the files that it names do not have the same tensors: {differing}.")
    return {name: header for (name, _), header in found.items()}


def _check_same_weights(path: Path, indexed: dict[str, Header], single: dict[str, Header]) -> None:
    """Refuse a folder whose single file and whose index are two models: readers differ in which they take.

    Compares bytes, one tensor at a time. Raises CheckpointError with the first tensors that differ.
    """
    names = sorted(indexed.keys() | single.keys())
    differing = (name for name in names if not _is_same(path, name, indexed.get(name), single.get(name)))
    if first := list(itertools.islice(differing, 3)):
        raise CheckpointError(
            f"{path} has both {WEIGHTS} and {INDEX}, and they do not hold the same weights ({', '.join(first)}): "
            f"transformers would take {WEIGHTS}. Move one of them out of the folder: {WEIGHTS}, or {INDEX} with the "
            "files that it names."
        )


def _is_same(path: Path, name: str, indexed: Header | None, single: Header | None) -> bool:
    if indexed is None or single is None or (indexed.shape, indexed.dtype) != (single.shape, single.dtype):
        return False
    if indexed.file == single.file:
        return True
    one, other = (_tensor(path, header.file, name).flatten() for header in (indexed, single))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _tensor(path: Path, file: str, name: str) -> torch.Tensor:
    try:
        with safe_open(path / file, framework="pt") as opened:
            return opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / file} cannot be read: {error}") from error


def _headers_of(path: Path, file: str) -> Iterator[tuple[str, Header]]:
    try:
        with safe_open(path / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (a safe_open is no dict)
                tensor = opened.get_slice(name)
                yield name, Header(file, tuple(tensor.get_shape()), tensor.get_dtype())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / file} cannot be read: {error}") from error
