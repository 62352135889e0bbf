"""What a rank runs with, as words to compare: its options, its code, its data."""

import hashlib
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import megatron_ring
from megatron_ring.config import Config, DataConfig
from megatron_ring.data.dataset import DEFAULT_FOLDER
from megatron_ring.data.manifest import manifest_path, tokenizer_path
from megatron_ring.data.prepare import prepare_python_library
from megatron_ring.data.token_index import idx_path
from megatron_ring.data.tokens import bin_path

Facts = dict[str, str]

# What computes where it is installed, by pip's names: a rank with others of them may compute otherwise.
_LIBRARIES = ("deepspeed", "triton", "flash-attn", "flash-attn-3", "liger-kernel", "apex")


def options(config: Config) -> Facts:
    """Every option as it was resolved, by name; the file it was read from may have another path on every host."""
    tree = {name: value for name, value in asdict(config).items() if name != "config"}
    sections = [value for value in tree.values() if isinstance(value, dict)]
    alone = {name: value for name, value in tree.items() if not isinstance(value, dict)}
    return {name: repr(value) for section in (*sections, alone) for name, value in section.items()}


def code() -> Facts:
    """The versions of what computes here, and a hash of the package's source: not every change has a new version."""
    return {
        "source of megatron_ring": _source_hash(),
        "version of megatron_ring": megatron_ring.__version__,
        "version of torch": torch.__version__,
    } | {f"version of {name}": _version(name) for name in _LIBRARIES}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _source_hash() -> str:
    root = Path(megatron_ring.__file__).parent
    found = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        found.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return found.hexdigest()[:12]


def data(config: DataConfig) -> Facts:
    """The sizes of each token store's files, and hashes of its manifest and of the tokenizer."""
    prefixes = list(config.blend) or [str(prepare_python_library(DEFAULT_FOLDER, 2))]
    facts = {"tokenizer": _hash(Path(config.tokenizer_model or tokenizer_path(prefixes[0])))}
    for prefix in prefixes:
        facts |= {
            f"size of {path}": f"{path.stat().st_size} bytes"
            for path in (bin_path(prefix), idx_path(prefix))
        }
        facts[str(manifest_path(prefix))] = _hash(manifest_path(prefix))
    return facts


def _hash(path: Path) -> str:
    return (
        f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
        if path.exists()
        else "no file"
    )
