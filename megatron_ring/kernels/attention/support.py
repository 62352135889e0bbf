"""What each kernel does and does not do: one cell for every kernel, device and feature, and nothing in between.

``choose`` asks this table before anything starts, so that no feature is ever ignored in silence. A test walks through
it: behind every TESTED cell is a parity test with the float64 oracle, behind every Unsupported one its message.
"""

import enum
from dataclasses import dataclass

import torch


class Feature(enum.Enum):
    """What a run may ask of a kernel; the value is how messages call it."""

    DOCUMENTS = "packed documents"
    WINDOW = "a sliding window"
    GROUPED_HEADS = "fewer key-value heads than query heads"
    SINKS = "attention sinks"
    SOFT_CAP = "capped scores"
    DROPOUT = "dropout of attention weights"
    DETERMINISM = "the same bits every time"
    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    HEAD_DIM_MULTIPLE_OF_8 = "a head size up to 256 that 8 divides"
    OTHER_HEADS = "a head size above 256 or that 8 does not divide"


class Validation(enum.Enum):
    """How well a cell is known to work."""

    TESTED = "tested"
    INTERPRETED = "tested in Triton's interpreter and compiled, and never run on such a device"
    UNPROVEN = "written and never run on such a device"


@dataclass(frozen=True)
class Unsupported:
    """reason: why not; instead: what to do, with the flag. Sentences without their full stops."""

    reason: str
    instead: str


Support = Validation | Unsupported
TESTED, INTERPRETED, UNPROVEN = Validation

_ON_CUDA = "torch's fused operators on cuda do not take it"
_OF_TWO_BYTES = "its tiles fill the shared memory with elements of two bytes"
_OF_EIGHTS = (
    "its table of tile sizes ends at 256, and rows that do not begin at 16 bytes load slowly"
)
_REFERENCE = "Set --attention-kernel reference, or auto"
_REPEATING = "Set --attention-kernel flash, sdpa, triton or reference"
_NO_CAP = Unsupported(
    "the gradient through a capped score is in none of torch's operators",
    "Set --attn-logit-softcapping 0, and hold scores down by a lower --lr or --clip-grad",
)
_NO_CAP_AT_EDGES = Unsupported(
    "flash-attn caps scores, torch's kernel for what it leaves does not", _NO_CAP.instead
)
_NO_DROPOUT = Unsupported(
    "each hop would have to draw the whole sequence's dropout again, by position",
    "Set --attention-dropout 0, and regularise by --weight-decay",
)

_TWO_BYTES_ONLY = Unsupported(
    "it computes in elements of two bytes", "Set --attention-kernel sdpa, or auto"
)
_HEADS_OF_EIGHTS_ONLY = Unsupported(
    "its head sizes end at 256, in steps of 8",
    f"{_REFERENCE}, or choose --hidden-size and --num-attention-heads for such a size",
)

# A column is a kernel on a device; "other" is any device that is not named beside the same kernel.
COLUMNS = (
    ("sdpa", "cpu"),
    ("reference", "cpu"),
    ("flash", "cuda"),
    ("cudnn", "cuda"),
    ("sdpa", "cuda"),
    ("triton", "cuda"),
    ("reference", "other"),
)
_EVERYWHERE = (TESTED, TESTED, UNPROVEN, UNPROVEN, UNPROVEN, INTERPRETED, UNPROVEN)
_ROWS: dict[Feature, tuple[Support, ...]] = {
    Feature.DOCUMENTS: _EVERYWHERE,
    Feature.WINDOW: _EVERYWHERE,
    Feature.GROUPED_HEADS: _EVERYWHERE,
    Feature.SINKS: _EVERYWHERE,
    Feature.SOFT_CAP: (_NO_CAP, _NO_CAP, _NO_CAP_AT_EDGES, _NO_CAP, _NO_CAP, _NO_CAP, _NO_CAP),
    Feature.DROPOUT: (_NO_DROPOUT,) * 7,
    Feature.DETERMINISM: (
        TESTED,
        TESTED,
        UNPROVEN,
        Unsupported("cuDNN adds up gradients in any order", _REPEATING),
        UNPROVEN,
        INTERPRETED,
        UNPROVEN,
    ),
    Feature.FLOAT64: (
        TESTED,
        TESTED,
        _TWO_BYTES_ONLY,
        _TWO_BYTES_ONLY,
        Unsupported(_ON_CUDA, _REFERENCE),
        Unsupported(_OF_TWO_BYTES, _REFERENCE),
        UNPROVEN,
    ),
    Feature.FLOAT32: (
        TESTED,
        TESTED,
        _TWO_BYTES_ONLY,
        _TWO_BYTES_ONLY,
        UNPROVEN,
        Unsupported(_OF_TWO_BYTES, _REFERENCE),
        UNPROVEN,
    ),
    Feature.BFLOAT16: _EVERYWHERE,
    Feature.FLOAT16: _EVERYWHERE,
    Feature.HEAD_DIM_MULTIPLE_OF_8: _EVERYWHERE,
    Feature.OTHER_HEADS: (
        TESTED,
        TESTED,
        _HEADS_OF_EIGHTS_ONLY,
        _HEADS_OF_EIGHTS_ONLY,
        Unsupported(
            _ON_CUDA,
            f"{_REFERENCE}, or choose --hidden-size and --num-attention-heads for such a size",
        ),
        Unsupported(
            _OF_EIGHTS,
            f"{_REFERENCE}, or choose --hidden-size and --num-attention-heads for such a size",
        ),
        UNPROVEN,
    ),
}
SUPPORT: dict[Feature, dict[tuple[str, str], Support]] = {
    feature: dict(zip(COLUMNS, cells)) for feature, cells in _ROWS.items()
}

_DTYPES = {
    torch.float64: Feature.FLOAT64,
    torch.float32: Feature.FLOAT32,
    torch.bfloat16: Feature.BFLOAT16,
    torch.float16: Feature.FLOAT16,
}


def of_tensors(dtype: torch.dtype, head_dim: int) -> set[Feature]:
    """What queries of this type and head size ask for."""
    of_eights = head_dim <= 256 and head_dim % 8 == 0
    return {_DTYPES[dtype], Feature.HEAD_DIM_MULTIPLE_OF_8 if of_eights else Feature.OTHER_HEADS}


def support(kernel: str, device_type: str, feature: Feature) -> Support:
    """The cell of the table."""
    cells = SUPPORT[feature]
    if cell := cells.get((kernel, device_type)) or cells.get((kernel, "other")):
        return cell
    known = " and ".join(device for name, device in COLUMNS if name == kernel)
    return Unsupported(f"it exists for {known}, not {device_type}", _REFERENCE)
