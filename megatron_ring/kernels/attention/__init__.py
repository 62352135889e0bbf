"""Attention of one hop: queries at hand, visiting keys, a mask in runs, a running softmax to continue.

Every kernel has the two functions of ``HopKernel`` and sees tensors and a mask, never a rank. ``KERNELS`` names them;
``choose`` settles ``--attention-kernel`` by the table of support.py and says why.
"""

import importlib.util
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch

from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.attention import reference, sdpa
from megatron_ring.kernels.attention.runs import KeyRuns
from megatron_ring.kernels.attention.state import RunningSoftmax
from megatron_ring.kernels.attention.support import (
    INTERPRETED,
    UNPROVEN,
    Feature,
    Refused,
    not_installed,
    of_tensors,
    support,
)


class HopKernel(Protocol):
    """Shapes: q, out (batch, queries, heads, head size); k, v (batch, keys, key-value heads, head size)."""

    def forward(
        self,
        q_BLHD: torch.Tensor,
        k_BLGD: torch.Tensor,
        v_BLGD: torch.Tensor,
        runs: KeyRuns,
        scale: float,
        state: RunningSoftmax,
    ) -> None:
        """Let the queries see their runs of this block of keys; ``state`` is updated in place."""

    def backward(
        self,
        dout_BLHD: torch.Tensor,
        q_BLHD: torch.Tensor,
        k_BLGD: torch.Tensor,
        v_BLGD: torch.Tensor,
        out_BLHD: torch.Tensor,
        lse_BHL: torch.Tensor,
        runs: KeyRuns,
        scale: float,
        dq_BLHD: torch.Tensor,
        dk_BLGD: torch.Tensor,
        dv_BLGD: torch.Tensor,
    ) -> None:
        """Add this block's share to the float32 gradients, from the final, merged ``out`` and ``lse``."""


KERNELS: dict[str, HopKernel] = {"sdpa": sdpa, "reference": reference}
if importlib.util.find_spec("triton"):
    from megatron_ring.kernels.attention import triton

    KERNELS["triton"] = triton

# Fastest first, where it can serve.
_PREFERENCE = ("sdpa", "reference")

# Whole tiles of the mask, which leave rectangles on every hop but the first; measured, docs/log.md.
_STRIPE_WIDTHS = {("sdpa", "cpu"): (256, 128)}


class KernelChoice(NamedTuple):
    name: str
    reason: str


def choose(
    asked: str, device_type: str, dtype: torch.dtype, head_dim: int, features: Iterable[Feature] = ()
) -> KernelChoice:
    """The kernel for ``--attention-kernel asked``, which does all of ``features`` with such tensors.

    Raises KernelUnavailable when the one asked for, or for ``auto`` every one, refuses some of it, saying all of it.
    """
    wanted = sorted({*features, *of_tensors(dtype, head_dim)}, key=list(Feature).index)
    candidates = _PREFERENCE if asked == "auto" else (asked,)
    refusals = {name: _refusals(name, device_type, wanted) for name in candidates}
    able = [name for name, refused in refusals.items() if not refused]
    if not able:
        raise KernelUnavailable(_messages(refusals))
    passed_over = {name: refusals[name] for name in candidates[: candidates.index(able[0])]}
    return KernelChoice(able[0], "; ".join(_reasons(asked, able[0], passed_over, device_type, dtype, wanted)))


def stripe_widths(kernel: str, device_type: str) -> tuple[int, ...]:
    """The widths of stripe that a kernel is faster with than with single tokens, the best first."""
    return _STRIPE_WIDTHS.get((kernel, device_type), ())


def _refusals(kernel: str, device_type: str, wanted: list[Feature]) -> dict[Refused, list[Feature]]:
    """What of ``wanted`` the kernel refuses, by the reason for it."""
    if kernel not in KERNELS:
        return {not_installed(kernel): wanted}
    found: dict[Refused, list[Feature]] = {}
    for feature in wanted:
        cell = support(kernel, device_type, feature)
        if isinstance(cell, Refused):
            found.setdefault(cell, []).append(feature)
    return found


def _messages(refusals: dict[str, dict[Refused, list[Feature]]]) -> list[str]:
    """One message for every reason, though several kernels may have it."""
    features = {refused: names for of_kernel in refusals.values() for refused, names in of_kernel.items()}
    return [
        f"attention_kernel {' and '.join(name for name in refusals if refused in refusals[name])} cannot do "
        f"{_named(asked_for)}: {refused.reason}. {refused.instead}."
        for refused, asked_for in features.items()
    ]


def _reasons(
    asked: str,
    chosen: str,
    passed_over: dict[str, dict[Refused, list[Feature]]],
    device_type: str,
    dtype: torch.dtype,
    wanted: list[Feature],
) -> Iterator[str]:
    """Why this kernel, and what of it no test has seen."""
    if asked == chosen:
        yield "asked for"
    for name, refusals in passed_over.items():
        for refused, features in refusals.items():
            yield f"{name} cannot do {_named(features)}: {refused.reason}"
    if asked == "auto" and not passed_over:
        yield f"the fastest on {device_type} in {dtype}"
    for proof in (INTERPRETED, UNPROVEN):
        if features := [feature for feature in wanted if support(chosen, device_type, feature) is proof]:
            yield f"{proof.value}: {_named(features)}"


def _named(features: list[Feature]) -> str:
    return ", ".join(feature.value for feature in features)
