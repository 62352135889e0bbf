"""The measured speed of kernels: the order in which ``--attention-kernel auto`` tries them.

``benchmarks/bench_gpu.py`` prints the lines of this table for the GPU that it ran on, ready to be
pasted here.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.registry import Feature, published_order
from megatron_ring.kernels.selection import Candidates


class MaskKind(enum.Enum):
    """The masks that are measured separately; the value is the name in messages."""

    CAUSAL = "a causal mask"
    SPARSE = "documents or a window"

    @staticmethod
    def of(features: Iterable[Feature]) -> "MaskKind":
        """SPARSE for a run with packed documents or sliding windows."""
        sparse = {Feature.DOCUMENTS, Feature.WINDOW} & set(features)
        return MaskKind.SPARSE if sparse else MaskKind.CAUSAL


@dataclass(frozen=True)
class Measured:
    """One measurement.

    device: a device type, or the beginning of a GPU's name.
    milliseconds: by kernel, the time of a rank's hops, forward and backward.
    source: where it was measured. head_dim: that of the queries.
    """

    device: str
    dtype: torch.dtype
    mask: MaskKind
    milliseconds: dict[str, float]
    source: str
    head_dim: int = 128

    @property
    def order(self) -> tuple[str, ...]:
        """The fastest kernel first; the reference last if its scores did not fit in memory."""
        fastest_first = sorted(self.milliseconds, key=self.milliseconds.__getitem__)
        return (*fastest_first, *({"reference"} - set(fastest_first)))


# One thread of a CPU that multiplies in bf16; benchmarks/bench_gpu.py --device cpu --tokens 512
# --heads 4 --kv-heads 2 --head-dim 64 --ring-sizes 1 --packs 4096 --dtype fp32 --order-dtypes fp32
# bf16 fp64 --minutes 2 --rounds 2
_CPU = "commit 133eb48, torch 2.13.0"

MEASURED = (
    Measured("cpu", torch.float32, MaskKind.CAUSAL, {"sdpa": 218.6, "reference": 951.2}, _CPU),
    Measured("cpu", torch.float32, MaskKind.SPARSE, {"sdpa": 99.98, "reference": 654.9}, _CPU),
    Measured("cpu", torch.bfloat16, MaskKind.CAUSAL, {"sdpa": 244.6, "reference": 444.9}, _CPU),
    Measured("cpu", torch.bfloat16, MaskKind.SPARSE, {"sdpa": 174.1, "reference": 586.8}, _CPU),
    Measured("cpu", torch.float64, MaskKind.CAUSAL, {"sdpa": 292.6, "reference": 1387}, _CPU),
    Measured("cpu", torch.float64, MaskKind.SPARSE, {"sdpa": 167.2, "reference": 2299}, _CPU),
)


def auto_order(
    device_type: str, dtype: torch.dtype, features: Iterable[Feature], machine: Machine
) -> Candidates:
    """Order the kernels as measured on such a device, else by published figures."""
    mask = MaskKind.of(features)
    device = machine.device_name(device_type)
    case = f"{dtype} with {mask.value}"
    for entry in MEASURED:
        if device.startswith(entry.device) and (entry.dtype, entry.mask) == (dtype, mask):
            fastest = f"{entry.order[0]} is the fastest in {case}, as measured ({entry.source})"
            return Candidates(entry.order, fastest)
    unmeasured = f"no measurement for {device} in {case}"
    if device_type == "cuda":
        names = published_order(mask is MaskKind.SPARSE, machine)
        return Candidates(names, f"{unmeasured}: the order is that of published figures")
    return Candidates(("sdpa", "reference"), f"{unmeasured}: a fused kernel before a plain one")
