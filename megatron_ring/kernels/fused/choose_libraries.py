"""Choose the library that computes each operation of a run, for ``--fused-operations``.

A library requested by name computes everything it supports, and torch the rest. ``auto`` is torch
on a CPU. On CUDA it uses for each operation the first installed library that supports it.
"""

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from packaging.version import Version

from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.fused.libraries import LIBRARIES, OFFERS, PREFERENCE, Library, Operation
from megatron_ring.kernels.fused.operations import TORCH, Operations
from megatron_ring.kernels.selection import (
    Assessment,
    Unsupported,
    first_usable,
    installed_version,
    refusals,
)

_FIELDS = {
    Operation.RMS_NORM: ("norm", "residual_norm"),
    Operation.LAYER_NORM: ("norm", "residual_norm"),
    Operation.ROPE: ("rope", "rope_and_pack"),
    Operation.WIDE_ROPE: ("rope", "rope_and_pack"),
    Operation.SWIGLU: ("swiglu",),
    Operation.CROSS_ENTROPY: ("cross_entropy",),
    Operation.SPLIT_CROSS_ENTROPY: ("cross_entropy",),
}
"""The fields of ``Operations`` for each operation, of which a library has at least one.

AdamW is not part of a model; it is torch's.
"""


@dataclass(frozen=True)
class OperationChoice:
    """The library chosen for one operation, and the reason."""

    operation: Operation
    library: str
    reason: str


@dataclass(frozen=True)
class OperationChoices:
    """The choices in the order of the required operations, and the functions for the model."""

    choices: tuple[OperationChoice, ...]
    operations: Operations = TORCH

    def describe(self) -> list[str]:
        """Format a line for each library and reason: ``liger for RMSNorm, RoPE: requested``."""
        groups: dict[tuple[str, str], list[str]] = {}
        for choice in self.choices:
            groups.setdefault((choice.library, choice.reason), []).append(choice.operation.value)
        return [
            f"{library} for {', '.join(names)}: {reason}"
            for (library, reason), names in groups.items()
        ]


def choose(
    requested: str,
    device_type: str,
    dtype: torch.dtype,
    required: Iterable[Operation],
    deterministic: bool = False,
) -> OperationChoices:
    """Choose a library for each of ``required``, for ``--fused-operations requested``.

    Raises KernelUnavailable, with the reasons, if a library requested by name supports none of
    them.
    """
    names = PREFERENCE if requested == "auto" else tuple(dict.fromkeys((requested, "torch")))
    unavailable = {name: _unavailable(name, device_type) for name in names}

    def assess(name: str, operation: Operation) -> Assessment:
        if unavailable[name]:
            return Assessment({}, unavailable[name])
        return Assessment({operation: OFFERS[operation][name].cell(dtype, deterministic)})

    choices = []
    for operation in required:
        assessments = {name: assess(name, operation) for name in names}
        library = first_usable(assessments)  # torch supports everything
        reason = "; ".join(_reasons(library, requested, assessments))
        choices.append(OperationChoice(operation, library, reason))
    if requested not in ("auto", "torch") and all(one.library == "torch" for one in choices):
        raise KernelUnavailable(_message(requested, unavailable[requested], choices))
    return OperationChoices(tuple(choices), _operations(choices))


def _reasons(library: str, requested: str, assessments: dict[str, Assessment]) -> Iterator[str]:
    """Yield why this library, why none before it, and how it has been validated."""
    if library == requested:
        yield "requested"
    for refusal in refusals(assessments, before=library):
        yield f"{', '.join(refusal.implementations)}: {refusal.cause.reason}"
    if library != "torch":
        if requested == "auto":
            yield "installed; which library is fastest has not been measured"
        for validation, _ in assessments[library].caveats():
            yield validation.caveat


def _unavailable(name: str, device_type: str) -> Unsupported | None:
    """Return why a library cannot be used at all on this machine, None if it can."""
    if name == "torch":
        return None
    if device_type != "cuda":
        return Unsupported(f"CUDA only, and this device is a {device_type}")
    reason = missing(LIBRARIES[name])
    return Unsupported(reason) if reason else None


def missing(library: Library) -> str | None:
    """Return what is missing of a library, and how to install it; None if it can be used."""
    version = installed_version(library.distribution)
    if not version:
        return f"not installed ({library.install})"
    if Version(version) < Version(library.oldest):
        return (
            f"{library.distribution} {version} is older than {library.oldest} ({library.install})"
        )
    try:
        importlib.import_module(library.module)
    except ImportError as error:
        return f"it cannot be imported, {error} ({library.install})"
    return None


def _message(
    requested: str, unavailable: Unsupported | None, choices: list[OperationChoice]
) -> str:
    if unavailable:
        reasons = unavailable.reason
    else:
        reasons = "; ".join(
            f"{one.operation.value}: {one.reason.removeprefix(f'{requested}: ')}" for one in choices
        )
    return (
        f"fused_operations {requested} is unavailable: {reasons}. "
        "Set --fused-operations auto or torch."
    )


def _operations(choices: list[OperationChoice]) -> Operations:
    # The products are torch's; with our own kernels nothing between them takes a pass it can spare.
    functions = {"sums_in_products": any(choice.library == "triton" for choice in choices)}
    for choice in choices:
        if choice.library != "torch":
            module = importlib.import_module(LIBRARIES[choice.library].module)
            for name in _FIELDS[choice.operation]:
                if hasattr(module, name):
                    functions[name] = getattr(module, name)
    return replace(TORCH, **functions)
