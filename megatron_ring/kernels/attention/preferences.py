"""What ``auto`` prefers: the order of the kernels, and the stripe widths of a kernel.

Both follow the measurements of measured.py where there are any. The rules for everything else are
here with their grounds, and each returned reason names the measurement or the rule that decided.
The kernel is chosen first, and then the stripes that are fastest with it.
"""

from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import torch

from megatron_ring.kernels.attention.flash import flash_version
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.measured import (
    MEASURED,
    MEASURED_STRIPES,
    SAME_GENERATION,
    WIDEST,
    MaskKind,
    Measured,
    MeasuredStripes,
    StripeSize,
)
from megatron_ring.kernels.attention.registry import KERNEL_SPECS, Feature
from megatron_ring.kernels.selection import Candidates, Unsupported

_HALF_PRECISION = (torch.bfloat16, torch.float16)

# ---- the order of the kernels ----


class Rule(NamedTuple):
    """An order of kernels where nothing was measured, and the ground for it.

    In ``order``, "flash 4" is version 4 of flash-attn alone, and "flash" whichever version is used.
    """

    order: tuple[str, ...]
    ground: str


# Version 4 is up to 1.3 times as fast as cuDNN 9.13 and 2.7 times as fast as Triton on B200. torch
# prefers cuDNN to version 2 on compute capability 9.0 and 10.0 alone (priority_order in
# sdp_utils.cpp).
_CAUSAL_ON_BLACKWELL = Rule(
    ("flash 4", "cudnn", "flash", "sdpa", "triton", "reference"),
    "published figures for B200 (Zadouri et al. 2026, FlashAttention-4)",
)
# Version 2, which torch's operator (sdpa) is too, is 1.3 to 1.5 times as fast as Triton forward and
# twice as fast backward on A100.
_CAUSAL = Rule(
    ("flash", "sdpa", "cudnn", "triton", "reference"),
    "published figures for A100 (Dao 2023, FlashAttention-2, section 4.1)",
)
# A hop is one launch of the Triton kernel, which skips what is masked; flash-attn has a call for
# many short sequences; the others are called tile by tile. That does not depend on the GPU.
_SPARSE = Rule(
    ("triton", "flash", "sdpa", "cudnn", "reference"),
    "triton computes a hop in one launch, and is three times as fast on an H100",
)

_WIDEST_HEAD_OF_TRITON = 128
"""With wider heads its backward kernels have too few registers (docs/decisions/0015)."""


def auto_order(
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    features: Iterable[Feature],
    mask: MaskKind,
    machine: Machine,
) -> Candidates:
    """Order the kernels as measured on such a device, else by a rule of this module."""
    device = machine.device_name(device_type)
    case = f"{dtype} with {mask.value}"
    is_half_on_gpu = device_type == "cuda" and dtype in _HALF_PRECISION
    deterministic = Feature.DETERMINISM in features
    version = _flash_attn_version(machine, head_dim, deterministic) if is_half_on_gpu else None
    for entry in _nearest_first(MEASURED, device, device_type, machine):
        if (entry.dtype, entry.mask) != (dtype, mask):
            continue
        order = _with_unmeasured(entry, device_type, head_dim)
        heads = f"a head dim of {entry.head_dim}" if head_dim != entry.head_dim else ""
        measured = _measured(entry, device, heads)
        fastest = f"{order[0]} is the fastest in {case}, {measured} ({entry.source})"
        if version and "flash" not in entry.milliseconds:
            fastest += f"; flash-attn {version} was not measured and comes after what was"
        return Candidates(order, fastest)
    unmeasured = f"no measurement for {device} in {case}"
    if device_type != "cuda":
        return Candidates(("sdpa", "reference"), f"{unmeasured}: a fused kernel before a plain one")
    if not is_half_on_gpu:
        ground = "the other fused kernels support only half precision"
        return Candidates(("sdpa", "reference"), f"{unmeasured}: {ground}")
    rule = _SPARSE
    if mask is MaskKind.CAUSAL:
        rule = _CAUSAL_ON_BLACKWELL if machine.capability[0] == 10 else _CAUSAL
    return Candidates(_of_version(rule.order, version), f"{unmeasured}: {rule.ground}")


def _with_unmeasured(entry: Measured, device_type: str, head_dim: int) -> tuple[str, ...]:
    """Return all kernels for the device: the measured ones first, the reference last.

    So flash-attn is used on a measured GPU only by name, in every version, until it is measured
    there: figures of whole sequences are not those of a ring's hops.
    """
    if device_type != "cuda":
        return entry.order
    fused = [name for name in entry.order if name != "reference"]
    is_wider = head_dim > max(_WIDEST_HEAD_OF_TRITON, entry.head_dim)
    if entry.mask is MaskKind.CAUSAL and is_wider:
        fused.sort(key=lambda name: name == "triton")  # it becomes the last
    others = [name for name in _CAUSAL.order if name not in (*fused, "reference")]
    return (*fused, *others, "reference")


def _flash_attn_version(machine: Machine, head_dim: int, deterministic: bool) -> int | None:
    """Return the version of flash-attn that the kernel "flash" would use, None without one."""
    version = flash_version(machine, head_dim, deterministic)
    return None if isinstance(version, Unsupported) else version.number


def _of_version(order: tuple[str, ...], version: int | None) -> tuple[str, ...]:
    """Replace "flash 4" by "flash" where that is the ``version`` in use, and drop it elsewhere."""
    names = ["flash" if name == f"flash {version}" else name for name in order]
    return tuple(dict.fromkeys(name for name in names if name in KERNEL_SPECS))


# ---- stripes ----


class StripeWidths(NamedTuple):
    """The stripe widths that a kernel is faster with than with single tokens, and the reason.

    The widest is preferred, if it balances the work (``auto_stripe_size``).
    """

    widths: tuple[StripeSize, ...]
    reason: str


# Multiples of its tile, which leave rectangles in every hop but the first; the widest and fastest
# first (docs/log.md).
_WIDTHS_ON_CPU = {"sdpa": (2048, 1024, 512, 256, 128)}
# The measured kernels that are called tile by tile agree, and flash-attn is: for one document two
# rectangles per hop are faster than a triangle; a striped pack of single tokens has no masked tiles
# (docs/decisions/0016).
_WIDTHS_OF_FLASH = {MaskKind.CAUSAL: (WIDEST,), MaskKind.SPARSE: ()}


def stripe_widths(
    kernel: str, device_type: str, mask: MaskKind, machine: Machine | None = None
) -> StripeWidths:
    """Return the stripe widths for a kernel; ``machine`` is this one by default.

    A GPU that was not measured takes the widths of its generation, else of any: they follow from
    the tiles of the kernel.
    """
    if device_type != "cuda":
        return StripeWidths(_WIDTHS_ON_CPU.get(kernel, ()), f"fastest with {kernel}")
    machine = machine or Machine.here()
    device = machine.device_name(device_type)
    own_first = [*_nearest_first(MEASURED_STRIPES, device, device_type, machine), *MEASURED_STRIPES]
    for entry in own_first:
        if (entry.kernel, entry.mask) == (kernel, mask):
            widths = () if entry.fastest == 1 else (entry.fastest,)
            fastest = f"fastest with {kernel} and {mask.value}"
            reason = f"{fastest}, {_measured(entry, device)} ({entry.source})"
            return StripeWidths(widths, reason)
    if kernel == "flash":
        return StripeWidths(
            _WIDTHS_OF_FLASH[mask], f"fastest with sdpa, and not measured with {kernel}"
        )
    return StripeWidths((), f"not measured with {kernel}")


# ---- the nearest measured device ----


_Entry = TypeVar("_Entry", Measured, MeasuredStripes)


def _nearest_first(
    entries: Iterable[_Entry], device: str, device_type: str, machine: Machine
) -> list[_Entry]:
    """Return the entries of this device, then those of the measured GPU of its generation."""
    generation = SAME_GENERATION.get(machine.capability) if device_type == "cuda" else None
    own = [entry for entry in entries if device.startswith(entry.device)]
    return own + [entry for entry in entries if entry.device == generation and entry not in own]


def _measured(entry: Measured | MeasuredStripes, device: str, heads: str = "") -> str:
    """Describe with what an entry was measured, and where; windows never were."""
    documents = "documents" if entry.mask is MaskKind.SPARSE else ""
    conditions = " and ".join(condition for condition in (documents, heads) if condition)
    with_what = f" with {conditions}" if conditions else ""
    other_device = "" if device.startswith(entry.device) else f" on {entry.device}"
    return f"as measured{with_what}{other_device}"
