"""--fused-operations settled: for each operation of a run the library that computes it, and why.

A library asked for by name computes all that it can, and torch the rest. ``auto`` is torch but on CUDA, where it takes
for each operation the first library of a list that is installed and can.
"""

import importlib
import importlib.metadata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from packaging.version import Version

from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.fused.operations import TORCH, Operations
from megatron_ring.kernels.fused.support import (
    LIBRARIES,
    OFFERS,
    PREFERENCE,
    Library,
    Operation,
    refusal,
)

_FIELDS = {
    Operation.RMS_NORM: "norm",
    Operation.LAYER_NORM: "norm",
    Operation.ROPE: "rope",
    Operation.WIDE_ROPE: "rope",
    Operation.SWIGLU: "swiglu",
    Operation.CROSS_ENTROPY: "cross_entropy",
    Operation.SPLIT_CROSS_ENTROPY: "cross_entropy",
}
"""Of Operations. AdamW is no part of a model, and always torch's."""


@dataclass(frozen=True)
class Settled:
    """One operation's library and the reason."""

    operation: Operation
    library: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """settled: in the order asked for. operations: what that comes down to, for the model."""

    settled: tuple[Settled, ...]
    operations: Operations = TORCH

    def in_words(self) -> list[str]:
        """``liger for RMSNorm, RoPE: asked for``, a line for each library and reason."""
        groups: dict[tuple[str, str], list[str]] = {}
        for choice in self.settled:
            groups.setdefault((choice.library, choice.reason), []).append(choice.operation.value)
        return [
            f"{library} for {', '.join(names)}: {reason}"
            for (library, reason), names in groups.items()
        ]


def choose(
    asked: str,
    device_type: str,
    dtype: torch.dtype,
    wanted: Iterable[Operation],
    deterministic: bool = False,
) -> Choice:
    """Who computes ``wanted`` for ``--fused-operations asked``, on such a device, in such a type.

    Raises KernelUnavailable for a library that was asked for by name and can compute none of it, saying why.
    """
    candidates = PREFERENCE if asked == "auto" else tuple(dict.fromkeys((asked, "torch")))
    absent = {name: _absence(name, device_type) for name in candidates}
    settled = []
    for operation in wanted:
        refusals = {
            name: absent[name] or refusal(operation, name, dtype, deterministic)
            for name in candidates
        }
        settled.append(_settled(operation, asked, refusals))
    if asked not in ("auto", "torch") and all(choice.library == "torch" for choice in settled):
        raise KernelUnavailable(_message(asked, absent[asked], settled))
    return Choice(tuple(settled), _operations(settled))


def _settled(operation: Operation, asked: str, refusals: dict[str, str | None]) -> Settled:
    """The first library that does not refuse; torch never does."""
    library = next(name for name, refused in refusals.items() if not refused)
    return Settled(operation, library, "; ".join(_reasons(operation, library, asked, refusals)))


def _reasons(
    operation: Operation, library: str, asked: str, refusals: dict[str, str | None]
) -> Iterator[str]:
    """Why this library, why none of those before it, and what of it no test has seen."""
    if library == asked:
        yield "asked for"
    passed_over: dict[str, list[str]] = {}
    for name in list(refusals)[: list(refusals).index(library)]:
        passed_over.setdefault(refusals[name], []).append(name)
    yield from (f"{', '.join(names)}: {refused}" for refused, names in passed_over.items())
    if library != "torch":
        if asked == "auto":
            yield "installed, and whether it is the fastest nobody has measured"
        yield OFFERS[operation][library].proof.value


def _absence(name: str, device_type: str) -> str | None:
    """Why a library is not there at all; None if it is."""
    if name == "torch":
        return None
    if device_type != "cuda":
        return f"for cuda alone, and this device is a {device_type}"
    return missing(LIBRARIES[name])


def missing(library: Library) -> str | None:
    """What of a library is missing on this machine, and how to get it; None if it can be used."""
    try:
        found = importlib.metadata.version(library.distribution)
        if Version(found) < Version(library.oldest):
            return (
                f"{library.distribution} {found} is older than {library.oldest} ({library.install})"
            )
        importlib.import_module(library.module)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed ({library.install})"
    except ImportError as error:
        return f"it cannot be imported, {error} ({library.install})"
    return None


def _message(asked: str, absent: str | None, settled: list[Settled]) -> str:
    refused = [
        f"{choice.operation.value}: {choice.reason.removeprefix(f'{asked}: ')}"
        for choice in settled
    ]
    return (
        f"fused_operations {asked} is not to be had: {absent or '; '.join(refused)}. "
        "Set --fused-operations auto or torch."
    )


def _operations(settled: list[Settled]) -> Operations:
    functions = {
        _FIELDS[choice.operation]: getattr(
            importlib.import_module(LIBRARIES[choice.library].module), _FIELDS[choice.operation]
        )
        for choice in settled
        if choice.library != "torch"
    }
    return replace(TORCH, **functions)
