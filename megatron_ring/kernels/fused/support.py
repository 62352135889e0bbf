"""Which library computes which operation: one cell for each, with the types it takes and why it takes no others.

``choose`` (choice.py) asks this table before anything starts. A test walks through it: what a cell offers has a test of
its numbers behind it, and docs/fused.md shows the table as it is here.
"""

import enum
from dataclasses import dataclass

import torch


class Operation(enum.Enum):
    """What a run may ask for; the value is how messages call it."""

    RMS_NORM = "RMSNorm"
    LAYER_NORM = "LayerNorm"
    ROPE = "RoPE"
    WIDE_ROPE = "RoPE of heads above 256"
    SWIGLU = "SwiGLU"
    CROSS_ENTROPY = "cross entropy"
    SPLIT_CROSS_ENTROPY = "cross entropy of a split vocabulary"
    ADAMW = "AdamW"


class Validation(enum.Enum):
    """How well a cell is known to work."""

    TESTED = "tested"
    INTERPRETED = "tested in Triton's interpreter, and never run on such a device"
    STAND_IN = "tested with a stand-in for the library, and never run on such a device"


@dataclass(frozen=True)
class Library:
    """distribution: the name and, if it matters, the oldest version. install: how to get it. module: ours around it."""

    distribution: str
    oldest: str
    install: str
    module: str


LIBRARIES = {
    "liger": Library(
        "liger-kernel",
        "0.8.5",
        "pip install 'liger-kernel>=0.8.5'",
        "megatron_ring.kernels.fused.liger",
    ),
    "flash-attn": Library(
        "flash-attn",
        "2.8.3",
        "pip install 'flash-attn>=2.8.3' --no-build-isolation",
        "megatron_ring.kernels.fused.flash_attn",
    ),
    "apex": Library(
        "apex",
        "0.1",
        "NVIDIA Apex from source, https://github.com/NVIDIA/apex, with its CUDA extensions: the package apex that pip "
        "finds is another project",
        "megatron_ring.kernels.fused.apex",
    ),
}
"""Those beside torch. They compute on CUDA alone."""

PREFERENCE = ("liger", "flash-attn", "apex", "torch")
"""What ``auto`` takes first on CUDA. Nobody has measured it."""

_SMALL = frozenset({torch.float32, torch.bfloat16, torch.float16})
_FLOAT32 = frozenset({torch.float32})


@dataclass(frozen=True)
class Offer:
    """A cell. dtypes: what it takes; reason: why no other. varies: why its bits are not the same in every run."""

    proof: Validation | None
    dtypes: frozenset[torch.dtype]
    reason: str
    varies: str = ""


_TESTED, _INTERPRETED, _STAND_IN = Validation
_TORCH = Offer(_TESTED, _SMALL | {torch.float64}, "")
_LIGER = Offer(_INTERPRETED, _SMALL, "it computes in float32")
_FLASH = Offer(_STAND_IN, _SMALL, "it computes in float32")
_TIMED = Offer(
    _STAND_IN, _SMALL, "it computes in float32", varies="it times its kernels and takes the fastest"
)


def _refused(reason: str) -> Offer:
    return Offer(None, frozenset(), reason)


_NONE = _refused("it has none")
_SPLIT = _refused("it meets the other ranks itself, over equal parts, and ours may be uneven")
_ROUNDED = Offer(
    _STAND_IN, _FLOAT32, "smaller types are rounded before the weight, where ours are rounded once"
)
_ANGLES = Offer(
    _STAND_IN, _FLOAT32, "it rounds cos and sin to the queries' type, where ours stay float32"
)
_UNGUARDED = _refused("it reads the logit of a target that does not count, outside of the row")
_STEPS = _refused(
    "it counts steps by group, where checkpoints and refused steps count them by parameter"
)
_WIDE = _refused("its heads end at 256")

COLUMNS = ("torch", "liger", "flash-attn", "apex")
_ROWS: dict[Operation, tuple[Offer, Offer, Offer, Offer]] = {
    Operation.RMS_NORM: (_TORCH, _LIGER, _TIMED, _ROUNDED),
    Operation.LAYER_NORM: (_TORCH, _LIGER, _TIMED, _ROUNDED),
    Operation.ROPE: (_TORCH, _LIGER, _FLASH, _ANGLES),
    Operation.WIDE_ROPE: (_TORCH, _LIGER, _WIDE, _ANGLES),
    Operation.SWIGLU: (_TORCH, _LIGER, _FLASH, _NONE),
    Operation.CROSS_ENTROPY: (_TORCH, _LIGER, _FLASH, _UNGUARDED),
    Operation.SPLIT_CROSS_ENTROPY: (_TORCH, _SPLIT, _SPLIT, _UNGUARDED),
    Operation.ADAMW: (_TORCH, _NONE, _NONE, _STEPS),
}
OFFERS: dict[Operation, dict[str, Offer]] = {
    operation: dict(zip(COLUMNS, offers)) for operation, offers in _ROWS.items()
}


def refusal(
    operation: Operation, library: str, dtype: torch.dtype, deterministic: bool
) -> str | None:
    """Why a library that is there does not compute this operation; None if it does."""
    offer = OFFERS[operation][library]
    if dtype not in offer.dtypes:
        return offer.reason
    if deterministic and offer.varies:
        return offer.varies
    return None
