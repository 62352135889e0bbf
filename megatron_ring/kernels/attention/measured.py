"""Which kernel is the fastest, as measured: what ``--attention-kernel auto`` goes by.

``tools/bench_gpu.py`` ends with the lines of this table for the GPU that it ran on, ready to be put in here.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.support import Feature


class MaskKind(enum.Enum):
    CAUSAL = "a causal mask"
    NARROWED = "documents or a window"


@dataclass(frozen=True)
class Measured:
    """device: a type, or how a GPU's name begins. order: the fastest first. source: where, by what command, when."""

    device: str
    dtype: torch.dtype
    mask: MaskKind
    order: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Order:
    """In which order ``auto`` asks the kernels, and why."""

    kernels: tuple[str, ...]
    reason: str


MEASURED: tuple[Measured, ...] = ()


def order(device_type: str, dtype: torch.dtype, features: Iterable[Feature], machine: Machine) -> Order:
    """What was measured on such a device, else what others have published for GPUs."""
    mask = mask_kind(features)
    device, case = machine.named(device_type), f"{dtype} with {mask.value}"
    for entry in MEASURED:
        if device.startswith(entry.device) and (entry.dtype, entry.mask) == (dtype, mask):
            return Order(entry.order, f"{' before '.join(entry.order)} in {case}, as measured ({entry.source})")
    unmeasured = f"no measurement for {device} in {case}"
    if device_type == "cuda":
        return Order(_published(mask, machine), f"{unmeasured}: the order is that of published figures")
    return Order(("sdpa", "reference"), f"{unmeasured}: a fused kernel before a plain one")


def _published(mask: MaskKind, machine: Machine) -> tuple[str, ...]:
    """On Hopper cuDNN lies between versions 3 and 2 of flash-attn (Shah et al. 2024, FlashAttention-3, section 4).

    For documents and windows flash-attn alone has a call that takes many short sequences.
    """
    if mask is MaskKind.NARROWED:
        return "flash", "sdpa", "reference"
    cudnn_first = machine.capability >= (9, 0) and not machine.flash_3
    return (*(("cudnn", "flash") if cudnn_first else ("flash", "cudnn")), "sdpa", "reference")


def mask_kind(features: Iterable[Feature]) -> MaskKind:
    narrowed = {Feature.DOCUMENTS, Feature.WINDOW} & set(features)
    return MaskKind.NARROWED if narrowed else MaskKind.CAUSAL
