"""Choose the attention kernel of a run, for ``--attention-kernel``.

It is the kernel requested by name or, with ``auto``, the fastest that supports the run.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.attention.flash import flash_version
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.measured import SAME_GENERATION, MaskKind
from megatron_ring.kernels.attention.preferences import auto_order
from megatron_ring.kernels.attention.registry import (
    KERNEL_SPECS,
    Feature,
    features_of_tensors,
    support,
)
from megatron_ring.kernels.selection import (
    Assessment,
    Candidates,
    Refusal,
    Validation,
    first_usable,
    refusals,
)


class KernelChoice(NamedTuple):
    """The name of the chosen kernel and the reason for it."""

    name: str
    reason: str


def choose(
    requested: str,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    features: Iterable[Feature] = (),
    machine: Machine | None = None,
    mask: MaskKind | None = None,
) -> KernelChoice:
    """Choose the kernel for ``--attention-kernel requested``, for ``features`` and such tensors.

    ``machine`` is this one by default, ``mask`` the one by which ``auto`` orders the kernels, that
    of ``features``. Raises KernelUnavailable, with every reason, if the requested kernel, or with
    ``auto`` every kernel, cannot be used.
    """
    machine = machine or Machine.here()
    required = sorted({*features, *features_of_tensors(dtype, head_dim)}, key=list(Feature).index)
    deterministic = Feature.DETERMINISM in required

    def assess(kernel: str) -> Assessment:
        cells = {feature: support(kernel, device_type, feature) for feature in required}
        if device_type != "cuda":
            return Assessment(cells)
        return Assessment(cells, KERNEL_SPECS[kernel].unavailable(machine, head_dim, deterministic))

    candidates = Candidates((requested,), "requested")
    if requested == "auto":
        mask = mask or MaskKind.of(required)
        candidates = auto_order(device_type, dtype, head_dim, required, mask, machine)
    assessments = {name: assess(name) for name in candidates.names}
    chosen = first_usable(assessments)
    if chosen is None:
        raise KernelUnavailable([_message(refusal) for refusal in refusals(assessments)])
    reasons = [candidates.reason, *_reasons(chosen, assessments, machine)]
    if chosen == "flash":
        reasons.append(flash_version(machine, head_dim, deterministic).reason)
    return KernelChoice(chosen, "; ".join(reasons))


def _reasons(chosen: str, assessments: dict[str, Assessment], machine: Machine) -> Iterator[str]:
    """Yield why the candidates before it were refused, and which of its features are untested."""
    for refusal in refusals(assessments, before=chosen):
        yield f"{_unsupported(refusal)}: {refusal.cause.reason}"
    for validation, features in assessments[chosen].caveats():
        if validation is Validation.MEASURED and machine.capability in SAME_GENERATION:
            continue
        yield f"{validation.caveat}: {', '.join(features)}"


def _message(refusal: Refusal) -> str:
    cause = refusal.cause
    return f"attention_kernel {_unsupported(refusal)}: {cause.reason}. {cause.instead}."


def _unsupported(refusal: Refusal) -> str:
    """Format a refusal without its reason: "sdpa and flash do not support attention dropout"."""
    kernels = " and ".join(refusal.implementations)
    if not refusal.requirements:
        return f"{kernels} cannot run here"
    does = "does" if len(refusal.implementations) == 1 else "do"
    return f"{kernels} {does} not support {', '.join(refusal.requirements)}"
