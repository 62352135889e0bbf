"""Which kernel a run gets: what ``--attention-kernel`` asks for, or the fastest that can serve, and why."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.attention.flash_version import flash_version
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.measured import Order, order
from megatron_ring.kernels.attention.missing import missing
from megatron_ring.kernels.attention.support import (
    INTERPRETED,
    UNPROVEN,
    Feature,
    Unsupported,
    of_tensors,
    support,
)

# What of the features asked for a kernel refuses, by the reason for it; none are named where it cannot run at all.
Refusals = dict[Unsupported, list[Feature]]


class KernelChoice(NamedTuple):
    name: str
    reason: str


class _Wanted(NamedTuple):
    """What a kernel has to do, and where."""

    device_type: str
    head_dim: int
    features: list[Feature]
    machine: Machine

    @property
    def deterministic(self) -> bool:
        return Feature.DETERMINISM in self.features


def choose(
    asked: str,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    features: Iterable[Feature] = (),
    machine: Machine | None = None,
) -> KernelChoice:
    """The kernel for ``--attention-kernel asked``, which does all of ``features`` with such tensors on ``machine``.

    Raises KernelUnavailable when the one asked for, or for ``auto`` every one, refuses some of it, saying all of it.
    """
    named = sorted({*features, *of_tensors(dtype, head_dim)}, key=list(Feature).index)
    wanted = _Wanted(device_type, head_dim, named, machine or Machine.here())
    auto = order(device_type, dtype, named, wanted.machine)
    candidates = auto if asked == "auto" else Order((asked,), "asked for")
    refusals = {name: _refusals(name, wanted) for name in candidates.kernels}
    able = [name for name, refused in refusals.items() if not refused]
    if not able:
        raise KernelUnavailable(_messages(refusals))
    return KernelChoice(able[0], "; ".join(_reasons(able[0], candidates, refusals, wanted)))


def _refusals(kernel: str, wanted: _Wanted) -> Refusals:
    """What the table of support refuses, and what this machine lacks."""
    found: Refusals = {}
    for feature in wanted.features:
        cell = support(kernel, wanted.device_type, feature)
        if isinstance(cell, Unsupported):
            found.setdefault(cell, []).append(feature)
    on_cuda = wanted.device_type == "cuda"
    if on_cuda and (lack := missing(kernel, wanted.machine, wanted.head_dim, wanted.deterministic)):
        found[lack] = []
    return found


def _messages(refusals: dict[str, Refusals]) -> list[str]:
    """One message for every reason, though several kernels may have it."""
    features = {
        refused: names for of_kernel in refusals.values() for refused, names in of_kernel.items()
    }
    return [
        f"attention_kernel {_cannot(' and '.join(name for name in refusals if refused in refusals[name]), asked_for)}: "
        f"{refused.reason}. {refused.instead}."
        for refused, asked_for in features.items()
    ]


def _reasons(
    chosen: str, candidates: Order, refusals: dict[str, Refusals], wanted: _Wanted
) -> Iterator[str]:
    """Why this kernel, and what of it no test has seen."""
    yield candidates.reason
    for name in candidates.kernels[: candidates.kernels.index(chosen)]:
        for refused, features in refusals[name].items():
            yield f"{_cannot(name, features)}: {refused.reason}"
    if chosen == "flash":
        yield flash_version(wanted.machine, wanted.head_dim, wanted.deterministic).reason
    for proof in (INTERPRETED, UNPROVEN):
        unseen = [
            one for one in wanted.features if support(chosen, wanted.device_type, one) is proof
        ]
        if unseen:
            yield f"{proof.value}: {_named(unseen)}"


def _cannot(kernels: str, features: list[Feature]) -> str:
    return f"{kernels} cannot do {_named(features)}" if features else f"{kernels} cannot run here"


def _named(features: list[Feature]) -> str:
    return ", ".join(feature.value for feature in features)
