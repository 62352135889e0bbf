"""The registry of attention kernels: what each supports and requires.

``KERNEL_SPECS`` has one entry for each kernel. A new kernel is a file with the two functions of
``HopKernel``, an entry here, and a test. From the entries ``SUPPORT`` is built: one cell for every
kernel, device and feature. ``choose`` reads it before a run starts, so no feature is ignored
silently, and a test walks through it: every TESTED cell has a parity test with the float64 oracle,
every Unsupported one a test of its message.
"""

import enum
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from megatron_ring.kernels.attention import flash, reference, sdpa
from megatron_ring.kernels.attention.hop_kernel import HopKernel
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.selection import Cell, Unsupported, Validation


class Feature(enum.Enum):
    """What a run may require of a kernel; the value is its name in messages."""

    DOCUMENTS = "packed documents"
    WINDOW = "sliding windows"
    GROUPED_HEADS = "grouped-query attention"
    SINKS = "attention sinks"
    SOFT_CAP = "logit soft-capping"
    DROPOUT = "attention dropout"
    DETERMINISM = "bitwise determinism"
    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    HEAD_DIM_MULTIPLE_OF_8 = "head dims up to 256, multiples of 8"
    OTHER_HEADS = "other head dims"


_DTYPES = {
    torch.float64: Feature.FLOAT64,
    torch.float32: Feature.FLOAT32,
    torch.bfloat16: Feature.BFLOAT16,
    torch.float16: Feature.FLOAT16,
}


def features_of_tensors(dtype: torch.dtype, head_dim: int) -> set[Feature]:
    """Return the features that queries of this dtype and head dim require."""
    regular = head_dim <= 256 and head_dim % 8 == 0
    return {_DTYPES[dtype], Feature.HEAD_DIM_MULTIPLE_OF_8 if regular else Feature.OTHER_HEADS}


Column = Mapping[Feature, Cell]
"""What a kernel supports on one type of device."""


@dataclass(frozen=True)
class KernelSpec:
    """Everything that the selection and its callers need of one kernel.

    kernel: its implementation, None where its package is not installed.
    support: its column by device type; "other" is for every type that has no column of its own.
    unavailable: (machine, head dim, deterministic) -> why it cannot run on that machine's GPU, None
        if it can.
    heads_first: the device types on which it is faster with each head's tokens contiguous in
        memory (memory_layout.py).
    """

    kernel: HopKernel | None
    support: Mapping[str, Column]
    unavailable: Callable[[Machine, int, bool], Unsupported | None] = lambda *_: None
    heads_first: frozenset[str] = frozenset()


# ---- refusals ----

_REFERENCE = "Set --attention-kernel reference, or auto"
_OTHER_HEAD_DIM = (
    f"{_REFERENCE}, or change --hidden-size and --num-attention-heads to such a head dim"
)
_NO_SOFT_CAP = Unsupported(
    "none of torch's operators computes the gradient of soft-capped scores",
    "Set --attn-logit-softcapping 0, and limit scores with a lower --lr or --clip-grad",
)
_NO_SOFT_CAP_IN_MASKED_TILES = Unsupported(
    "flash-attn soft-caps scores, but torch's kernel for the masked tiles does not",
    _NO_SOFT_CAP.instead,
)
_NO_DROPOUT = Unsupported(
    "each hop would have to redraw the dropout of the whole sequence, by position",
    "Set --attention-dropout 0, and regularise with --weight-decay",
)
_HALF_PRECISION_ONLY = Unsupported(
    "it supports only fp16 and bf16", "Set --attention-kernel sdpa, or auto"
)
_MULTIPLES_OF_8_ONLY = Unsupported(
    "it supports head dims up to 256 that are multiples of 8", _OTHER_HEAD_DIM
)
_VENDOR_LIMITS: dict[Feature, Unsupported] = {
    Feature.FLOAT64: _HALF_PRECISION_ONLY,
    Feature.FLOAT32: _HALF_PRECISION_ONLY,
    Feature.OTHER_HEADS: _MULTIPLES_OF_8_ONLY,
}
_UNORDERED_GRADIENTS = Unsupported(
    "cuDNN accumulates gradients in no fixed order",
    "Set --attention-kernel flash, sdpa, triton or reference",
)
_NOT_IN_TORCH_ON_CUDA = "torch's fused operators on CUDA do not support it"
_TRITON_TILES_FILL_SHARED_MEMORY = Unsupported(
    "its tiles fill shared memory with 2-byte elements", _REFERENCE
)
_TRITON_HEAD_DIMS = Unsupported(
    "its table of tile sizes ends at head dim 256, and rows that are not aligned to 16 bytes load "
    "slowly",
    _OTHER_HEAD_DIM,
)


def _column(
    validation: Validation,
    refused: Mapping[Feature, Unsupported] | None = None,
    measured: Iterable[Feature] = (),
) -> Column:
    """Fill a column with ``validation``, except ``refused``, soft-capping and dropout.

    ``measured`` features were right on an NVIDIA H100 80GB HBM3.
    """
    by_all_kernels = {Feature.SOFT_CAP: _NO_SOFT_CAP, Feature.DROPOUT: _NO_DROPOUT}
    on_h100 = dict.fromkeys(measured, Validation.MEASURED)
    return dict.fromkeys(Feature, validation) | on_h100 | by_all_kernels | dict(refused or {})


# At commit 58ca893, 2026-11-27: compared with float64 in bf16, with 4 query heads and 1 key-value
# head of 128, over layouts and masks; and training runs with heads of 64 in fp32, bf16 and fp16,
# compared with one process. Documents with sdpa and cudnn were right there without a ring and wrong
# in one in half precision, so they are left out, as are their windows, which take the same
# operator.
_MEASURED = (Feature.GROUPED_HEADS, Feature.BFLOAT16, Feature.HEAD_DIM_MULTIPLE_OF_8)


# ---- the kernels ----


def _triton_kernel() -> HopKernel | None:
    if not importlib.util.find_spec("triton"):
        return None
    from megatron_ring.kernels.attention import triton

    return triton


def _triton_unavailable(machine: Machine, head_dim: int, deterministic: bool) -> Unsupported | None:
    if not machine.triton:
        install = "pip install triton, or set --attention-kernel auto"
        return Unsupported("triton is not installed", install)
    if too_low := machine.requires_capability((8, 0)):
        return too_low
    if head_dim > 128 and machine.has_small_shared_memory:
        reason = (
            f"its tiles for head dims above 128, here {head_dim}, exceed the shared memory of "
            "compute capability {}.{}".format(*machine.capability)
        )
        return Unsupported(reason, "Set --attention-kernel sdpa, or auto")
    return None


KERNEL_SPECS: dict[str, KernelSpec] = {
    "flash": KernelSpec(
        kernel=flash,
        support={
            "cuda": _column(
                Validation.UNPROVEN,
                _VENDOR_LIMITS | {Feature.SOFT_CAP: _NO_SOFT_CAP_IN_MASKED_TILES},
            )
        },
        unavailable=flash.unavailable,
    ),
    "cudnn": KernelSpec(
        kernel=sdpa.WITH_CUDNN,
        support={
            "cuda": _column(
                Validation.UNPROVEN,
                _VENDOR_LIMITS | {Feature.DETERMINISM: _UNORDERED_GRADIENTS},
                measured=(*_MEASURED, Feature.FLOAT16),
            )
        },
        unavailable=sdpa.cudnn_unavailable,
    ),
    "sdpa": KernelSpec(
        kernel=sdpa,
        support={
            "cpu": _column(Validation.TESTED),
            "cuda": _column(
                Validation.UNPROVEN,
                {
                    Feature.FLOAT64: Unsupported(_NOT_IN_TORCH_ON_CUDA, _REFERENCE),
                    Feature.OTHER_HEADS: Unsupported(_NOT_IN_TORCH_ON_CUDA, _OTHER_HEAD_DIM),
                },
                measured=(*_MEASURED, Feature.FLOAT32),
            ),
        },
        # torch's CPU operator reads a head's rows from end to end; in a model's memory layout the
        # other heads' rows are in between.
        heads_first=frozenset({"cpu"}),
    ),
    "triton": KernelSpec(
        kernel=_triton_kernel(),
        support={
            "cuda": _column(
                Validation.INTERPRETED,
                {
                    Feature.FLOAT64: _TRITON_TILES_FILL_SHARED_MEMORY,
                    Feature.FLOAT32: _TRITON_TILES_FILL_SHARED_MEMORY,
                    Feature.OTHER_HEADS: _TRITON_HEAD_DIMS,
                },
                measured=(*_MEASURED, Feature.DOCUMENTS, Feature.WINDOW),
            )
        },
        unavailable=_triton_unavailable,
    ),
    "reference": KernelSpec(
        kernel=reference,
        support={"cpu": _column(Validation.TESTED), "other": _column(Validation.UNPROVEN)},
    ),
}

KERNELS: dict[str, HopKernel] = {
    name: spec.kernel for name, spec in KERNEL_SPECS.items() if spec.kernel is not None
}

COLUMNS: tuple[tuple[str, str], ...] = tuple(
    (name, device)
    for device in ("cpu", "cuda", "other")
    for name, spec in KERNEL_SPECS.items()
    if device in spec.support
)
"""The kernel and device type of each column, in the order of docs/support.md."""

SUPPORT: dict[Feature, dict[tuple[str, str], Cell]] = {
    feature: {
        (name, device): KERNEL_SPECS[name].support[device][feature] for name, device in COLUMNS
    }
    for feature in Feature
}


def support(kernel: str, device_type: str, feature: Feature) -> Cell:
    """Return the cell of the support table for ``kernel`` on such a device."""
    cells = SUPPORT[feature]
    if cell := cells.get((kernel, device_type)) or cells.get((kernel, "other")):
        return cell
    devices = " and ".join(device for name, device in COLUMNS if name == kernel)
    return Unsupported(f"it runs on {devices}, not {device_type}", _REFERENCE)
