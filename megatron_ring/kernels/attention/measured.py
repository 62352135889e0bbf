"""Which kernel is the fastest, as measured: what ``--attention-kernel auto`` goes by.

``benchmarks/bench_gpu.py`` ends with the lines of this table for the GPU that it ran on, ready to be put in here.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.support import Feature


class MaskKind(enum.Enum):
    CAUSAL = "a causal mask"
    SPARSE = "documents or a window"


@dataclass(frozen=True)
class Measured:
    """device: a type, or how a GPU's name begins. milliseconds: of a rank's hops, forward and backward, by kernel."""

    device: str
    dtype: torch.dtype
    mask: MaskKind
    milliseconds: dict[str, float]
    source: str

    @property
    def order(self) -> tuple[str, ...]:
        """The fastest first; the reference, which is not asked where its scores would fill the memory, last."""
        asked = sorted(self.milliseconds, key=self.milliseconds.__getitem__)
        return (*asked, *({"reference"} - set(asked)))


@dataclass(frozen=True)
class Order:
    """In which order ``auto`` asks the kernels, and why."""

    kernels: tuple[str, ...]
    reason: str


# One thread of a CPU that multiplies in bf16; benchmarks/bench_gpu.py --device cpu --tokens 512 --heads 4 --kv-heads 2
# --head-dim 64 --ring-sizes 1 --packs 4096 --dtype fp32 --order-dtypes fp32 bf16 fp64 --minutes 2 --rounds 2
_CPU = "commit 133eb48, torch 2.13.0"

MEASURED = (
    Measured("cpu", torch.float32, MaskKind.CAUSAL, {"sdpa": 218.6, "reference": 951.2}, _CPU),
    Measured("cpu", torch.float32, MaskKind.SPARSE, {"sdpa": 99.98, "reference": 654.9}, _CPU),
    Measured("cpu", torch.bfloat16, MaskKind.CAUSAL, {"sdpa": 244.6, "reference": 444.9}, _CPU),
    Measured("cpu", torch.bfloat16, MaskKind.SPARSE, {"sdpa": 174.1, "reference": 586.8}, _CPU),
    Measured("cpu", torch.float64, MaskKind.CAUSAL, {"sdpa": 292.6, "reference": 1387}, _CPU),
    Measured("cpu", torch.float64, MaskKind.SPARSE, {"sdpa": 167.2, "reference": 2299}, _CPU),
)


def order(
    device_type: str, dtype: torch.dtype, features: Iterable[Feature], machine: Machine
) -> Order:
    """What was measured on such a device, else what others have published for GPUs."""
    mask = mask_kind(features)
    device, case = machine.named(device_type), f"{dtype} with {mask.value}"
    for entry in MEASURED:
        if device.startswith(entry.device) and (entry.dtype, entry.mask) == (dtype, mask):
            return Order(
                entry.order,
                f"{entry.order[0]} is the fastest in {case}, as measured ({entry.source})",
            )
    unmeasured = f"no measurement for {device} in {case}"
    if device_type == "cuda":
        return Order(
            _published(mask, machine), f"{unmeasured}: the order is that of published figures"
        )
    return Order(("sdpa", "reference"), f"{unmeasured}: a fused kernel before a plain one")


def _published(mask: MaskKind, machine: Machine) -> tuple[str, ...]:
    """On Hopper cuDNN lies between versions 3 and 2 of flash-attn (Shah et al. 2024, FlashAttention-3, section 4).

    For documents and windows flash-attn alone has a call that takes many short sequences.
    """
    if mask is MaskKind.SPARSE:
        return "flash", "sdpa", "reference"
    cudnn_first = machine.capability >= (9, 0) and not machine.flash_3
    return (*(("cudnn", "flash") if cudnn_first else ("flash", "cudnn")), "sdpa", "reference")


def mask_kind(features: Iterable[Feature]) -> MaskKind:
    narrowed = {Feature.DOCUMENTS, Feature.WINDOW} & set(features)
    return MaskKind.SPARSE if narrowed else MaskKind.CAUSAL
