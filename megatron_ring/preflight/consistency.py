"""What every rank must have alike: options, code and data; whoever has something else is named before it can do harm.

Ranks with other options may build other process groups and wait for each other for ever, so options and code are
compared as soon as the processes have joined. Nothing is built on what has not been compared.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import megatron_ring
from megatron_ring.checkpoint.provenance import commit
from megatron_ring.config import Config, DataConfig
from megatron_ring.data.dataset import DEFAULT_FOLDER
from megatron_ring.data.manifest import manifest_path, tokenizer_path
from megatron_ring.data.prepare import prepare_python_library
from megatron_ring.data.token_index import idx_path
from megatron_ring.data.tokens import bin_path
from megatron_ring.errors import ConfigError, flag
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.process_id import Process, in_words

Facts = dict[str, str]


def check_options_and_code(config: Config, consensus: Consensus) -> None:
    """Raises ConfigError on every rank where any has another option or other code than another. Blocks."""
    problems = differences(
        consensus, lambda: options(config), lambda name: f"Give every rank the same {flag(name)}."
    )
    if other_code := differences(consensus, code, lambda name: "Give every host the same."):
        # What git says is asked only now: it takes its time, and counts changes that compute nothing.
        other_code += differences(
            consensus, lambda: {"commit": commit() or "none"}, lambda name: "Check out one."
        )
    if problems or other_code:
        raise ConfigError(problems + other_code)


def check_data(config: DataConfig, consensus: Consensus) -> None:
    """Raises ConfigError on every rank where any reads other files than another. Blocks."""
    if problems := differences(
        consensus, lambda: data(config), lambda name: "Copy the store anew to where it differs."
    ):
        raise ConfigError(problems)


def differences(
    consensus: Consensus, facts: Callable[[], Facts], remedy: Callable[[str], str]
) -> list[str]:
    """What to say of each fact that is not the same on all ranks, the same on every rank: its values and who has them.

    A user's fault in finding out the facts is raised on all.
    """
    found = consensus.gather(lambda: (Process.here(consensus.rank), facts()))
    names = dict.fromkeys(name for _, facts_of_rank in found for name in facts_of_rank)
    values = {name: _holders(name, found) for name in names}
    return [
        f"{name} is not the same on all ranks: "
        f"{'; '.join(f'{value} on {in_words(holders)}' for value, holders in of_value.items())}. {remedy(name)}"
        for name, of_value in values.items()
        if len(of_value) > 1
    ]


def _holders(name: str, found: list[tuple[Process, Facts]]) -> dict[str, list[Process]]:
    holders: dict[str, list[Process]] = {}
    for process, facts in found:
        holders.setdefault(facts.get(name, "nothing"), []).append(process)
    return holders


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
