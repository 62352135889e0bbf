"""Which library computes which operation: one cell for each, with the dtypes it supports.

``LIBRARIES`` has one entry for each library. ``choose`` (choose_libraries.py) reads it before a run
starts. A test walks through it: every supported cell has a test of its numbers, and docs/fused.md
shows this table.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_ring.kernels.selection import Cell, Unsupported, Validation


class Operation(enum.Enum):
    """What a run may require; the value is its name in messages."""

    RMS_NORM = "RMSNorm"
    LAYER_NORM = "LayerNorm"
    ROPE = "RoPE"
    WIDE_ROPE = "RoPE of heads above 256"
    SWIGLU = "SwiGLU"
    CROSS_ENTROPY = "cross entropy"
    SPLIT_CROSS_ENTROPY = "cross entropy of a split vocabulary"
    ADAMW = "AdamW"


@dataclass(frozen=True)
class Offer:
    """A cell of the table.

    validation: how it has been validated, None if the operation is not supported in any dtype.
    dtypes: the supported ones. reason: why no others.
    varies: why its bits differ from run to run, "" if they do not.
    """

    validation: Validation | None
    dtypes: frozenset[torch.dtype]
    reason: str
    varies: str = ""

    def cell(self, dtype: torch.dtype, deterministic: bool) -> Cell:
        """Return the cell for a run in ``dtype``, with or without ``--deterministic``."""
        if dtype not in self.dtypes:
            return Unsupported(self.reason)
        if deterministic and self.varies:
            return Unsupported(self.varies)
        return self.validation


@dataclass(frozen=True)
class Library:
    """A library other than torch, or our own kernels in Triton; all of them run only on CUDA.

    distribution: the installed distribution. oldest: its first version that works.
    install: how to install it. module: our wrapper, with functions named as in ``Operations``.
    offers: what it supports; an operation without an entry has no kernel there.
    """

    distribution: str
    oldest: str
    install: str
    module: str
    offers: Mapping[Operation, Offer]


def _refused(reason: str) -> Offer:
    return Offer(None, frozenset(), reason)


_UP_TO_FLOAT32 = frozenset({torch.float32, torch.bfloat16, torch.float16})
_FLOAT32 = frozenset({torch.float32})

_TORCH = Offer(Validation.TESTED, _UP_TO_FLOAT32 | {torch.float64}, "")
_NO_KERNEL = _refused("it has no such kernel")
_EVEN_SPLIT_ONLY = _refused(
    "it reduces over the ranks itself and requires equal parts; here they may be uneven"
)

_LIGER = Offer(Validation.INTERPRETED, _UP_TO_FLOAT32, "it computes in float32")
_FLASH = Offer(Validation.STAND_IN, _UP_TO_FLOAT32, "it computes in float32")
_FLASH_NORM = Offer(
    Validation.STAND_IN,
    _UP_TO_FLOAT32,
    "it computes in float32",
    varies="it times several kernels and uses the fastest",
)
_APEX_NORM = Offer(
    Validation.STAND_IN,
    _FLOAT32,
    "it rounds smaller dtypes before the weight is applied; torch rounds once, after it",
)
_APEX_ROPE = Offer(
    Validation.STAND_IN,
    _FLOAT32,
    "it rounds cos and sin to the queries' dtype; here they are float32",
)
_APEX_CROSS_ENTROPY = _refused("it reads the logit of an ignored target, outside the row")

_OURS = Offer(Validation.INTERPRETED, _UP_TO_FLOAT32, "it computes in float32")

LIBRARIES = {
    "triton": Library(
        distribution="triton",
        oldest="3.6",
        install="pip install 'triton>=3.6'",
        module="megatron_ring.kernels.fused.triton",
        offers={
            Operation.RMS_NORM: _OURS,
            Operation.ROPE: _OURS,
            Operation.WIDE_ROPE: _OURS,
            Operation.SWIGLU: _OURS,
        },
    ),
    "liger": Library(
        distribution="liger-kernel",
        oldest="0.8.5",
        install="pip install 'liger-kernel>=0.8.5'",
        module="megatron_ring.kernels.fused.liger",
        offers={
            Operation.RMS_NORM: _LIGER,
            Operation.LAYER_NORM: _LIGER,
            Operation.ROPE: _LIGER,
            Operation.WIDE_ROPE: _LIGER,
            Operation.SWIGLU: _LIGER,
            Operation.CROSS_ENTROPY: _LIGER,
            Operation.SPLIT_CROSS_ENTROPY: _EVEN_SPLIT_ONLY,
        },
    ),
    "flash-attn": Library(
        distribution="flash-attn",
        oldest="2.8.3",
        install="pip install 'flash-attn>=2.8.3' --no-build-isolation",
        module="megatron_ring.kernels.fused.flash_attn",
        offers={
            Operation.RMS_NORM: _FLASH_NORM,
            Operation.LAYER_NORM: _FLASH_NORM,
            Operation.ROPE: _FLASH,
            Operation.WIDE_ROPE: _refused("it supports head dims up to 256"),
            Operation.SWIGLU: _FLASH,
            Operation.CROSS_ENTROPY: _FLASH,
            Operation.SPLIT_CROSS_ENTROPY: _EVEN_SPLIT_ONLY,
        },
    ),
    "apex": Library(
        distribution="apex",
        oldest="0.1",
        install="NVIDIA Apex from source, https://github.com/NVIDIA/apex, with its CUDA "
        "extensions: the package apex that pip installs is another project",
        module="megatron_ring.kernels.fused.apex",
        offers={
            Operation.RMS_NORM: _APEX_NORM,
            Operation.LAYER_NORM: _APEX_NORM,
            Operation.ROPE: _APEX_ROPE,
            Operation.WIDE_ROPE: _APEX_ROPE,
            Operation.CROSS_ENTROPY: _APEX_CROSS_ENTROPY,
            Operation.SPLIT_CROSS_ENTROPY: _APEX_CROSS_ENTROPY,
            Operation.ADAMW: _refused(
                "it counts steps per parameter group; checkpoints and skipped steps count them per "
                "parameter"
            ),
        },
    ),
}

COLUMNS = ("torch", *LIBRARIES)

PREFERENCE = (*LIBRARIES, "torch")
"""The order in which ``auto`` tries the libraries on CUDA.

Ours are first, because they move the fewest bytes (docs/decisions/0025). It has not been measured.
"""

OFFERS: dict[Operation, dict[str, Offer]] = {
    operation: {
        "torch": _TORCH,
        **{name: library.offers.get(operation, _NO_KERNEL) for name, library in LIBRARIES.items()},
    }
    for operation in Operation
}
