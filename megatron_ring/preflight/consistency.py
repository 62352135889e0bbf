"""Checks that all ranks run with the same options, code and data, and names those that differ.

Ranks with different options may build different process groups and then wait for each other
forever, so options and code are compared as soon as the processes have joined. Nothing is built
from a value that has not been compared.
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
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.dataset import DEFAULT_FOLDER
from megatron_ring.data.manifest import manifest_path, tokenizer_path
from megatron_ring.data.prepare import prepare_python_library
from megatron_ring.data.token_index import idx_path
from megatron_ring.data.tokens import bin_path
from megatron_ring.errors import ConfigError, flag
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.process_id import ProcessId, describe_processes

Fingerprints = dict[str, str]
"""What is compared, by name, as text for the message."""

# Libraries whose code runs when they are installed, by their names for pip. A rank with another
# version, or without one, may compute something else.
_LIBRARIES = (
    "deepspeed",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "quack-kernels",
    "liger-kernel",
    "apex",
)


def check_options_and_code(config: Config, consensus: Consensus) -> None:
    """Raise ConfigError on every rank if options or code differ between ranks. Blocks."""
    problems = differences(
        consensus,
        lambda: options(config),
        lambda name: f"Give every rank the same {flag(name)}.",
    )
    code_problems = differences(
        consensus, code, lambda name: "Install the same version on every host."
    )
    if code_problems:
        # git is slow, and commits also differ by changes that compute nothing, so the commit is
        # only looked up to explain a difference that was found.
        code_problems += differences(
            consensus,
            lambda: {"commit": commit() or "none"},
            lambda name: "Check out the same commit on every host.",
        )
    if problems or code_problems:
        raise ConfigError(problems + code_problems)


def check_layout(layout: Layout, consensus: Consensus) -> None:
    """Raise ConfigError on every rank if the layout differs between ranks. Blocks.

    --stripe-size auto follows the GPU, and the ranks of a job may have different ones.
    """
    problems = differences(
        consensus,
        lambda: {"stripe_size": str(layout.stripe_size)},
        lambda name: f"Set {flag(name)} to one of these.",
    )
    if problems:
        raise ConfigError(problems)


def check_data(config: DataConfig, consensus: Consensus) -> None:
    """Raise ConfigError on every rank if the data files differ between ranks. Blocks."""
    problems = differences(
        consensus,
        lambda: data(config),
        lambda name: "Copy the store again to the hosts where it differs.",
    )
    if problems:
        raise ConfigError(problems)


def differences(
    consensus: Consensus,
    fingerprints: Callable[[], Fingerprints],
    remedy: Callable[[str], str],
) -> list[str]:
    """Return a message for each fingerprint that differs, with its values and their ranks.

    The list is the same on every rank. A MegatronRingError that ``fingerprints`` raises on any rank
    is raised on all. Blocks.
    """
    gathered = consensus.gather(lambda: (ProcessId.here(consensus.rank), fingerprints()))
    names = dict.fromkeys(name for _, of_rank in gathered for name in of_rank)
    problems = []
    for name in names:
        processes_by_value = _processes_by_value(name, gathered)
        if len(processes_by_value) > 1:
            values = "; ".join(
                f"{value} on {describe_processes(processes)}"
                for value, processes in processes_by_value.items()
            )
            problems.append(f"{name} is not the same on all ranks: {values}. {remedy(name)}")
    return problems


def _processes_by_value(
    name: str, gathered: list[tuple[ProcessId, Fingerprints]]
) -> dict[str, list[ProcessId]]:
    processes: dict[str, list[ProcessId]] = {}
    for process, fingerprints in gathered:
        value = fingerprints.get(name, "nothing")
        processes.setdefault(value, []).append(process)
    return processes


def options(config: Config) -> Fingerprints:
    """Return every resolved option, except the path of the file that it was read from.

    That path may differ between hosts.
    """
    tree = {name: value for name, value in asdict(config).items() if name != "config"}
    found = {}
    top_level = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= {option: repr(setting) for option, setting in value.items()}
        else:
            top_level[name] = repr(value)
    return found | top_level


def code() -> Fingerprints:
    """Return the versions of the code that computes, and a hash of this package's source.

    The hash is needed because not every change of the source changes the version.
    """
    found = {
        "source of megatron_ring": _source_hash(),
        "version of megatron_ring": megatron_ring.__version__,
        "version of torch": torch.__version__,
    }
    return found | {f"version of {name}": _version(name) for name in _LIBRARIES}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _source_hash() -> str:
    root = Path(megatron_ring.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def data(config: DataConfig) -> Fingerprints:
    """Return the file sizes of each token store, and hashes of its manifest and the tokenizer."""
    prefixes = list(config.blend) or [str(prepare_python_library(DEFAULT_FOLDER, 2))]
    found = {"tokenizer": _hash(Path(config.tokenizer_model or tokenizer_path(prefixes[0])))}
    for prefix in prefixes:
        for path in (bin_path(prefix), idx_path(prefix)):
            found[f"size of {path}"] = f"{path.stat().st_size} bytes"
        found[str(manifest_path(prefix))] = _hash(manifest_path(prefix))
    return found


def _hash(path: Path) -> str:
    if not path.exists():
        return "no file"
    return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
