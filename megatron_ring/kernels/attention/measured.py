"""Measured speeds: of the kernels, and of the stripe sizes of each kernel.

``benchmarks/bench_gpu.py`` prints the lines of both tables for the GPU that it ran on, ready to be
pasted here. What ``auto`` makes of them is in preferences.py.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_ring.kernels.attention.registry import Feature

WIDEST: Literal["widest"] = "widest"
"""The stripe size that gives every rank two stripes, which are the chunks of the zigzag layout."""

StripeSize = int | Literal["widest"]


class MaskKind(enum.Enum):
    """The masks that are measured separately; the value is the name in messages."""

    CAUSAL = "a causal mask"
    SPARSE = "documents or a window"

    @staticmethod
    def of(features: Iterable[Feature]) -> "MaskKind":
        """SPARSE for a run with packed documents or sliding windows."""
        sparse = {Feature.DOCUMENTS, Feature.WINDOW} & set(features)
        return MaskKind.SPARSE if sparse else MaskKind.CAUSAL


# cuDNN builds a plan for every new shape, and every pack has new shapes. A benchmark repeats one
# pack, so its times do not include the plans.
_BUILDS_PLANS = "cudnn"


@dataclass(frozen=True)
class Measured:
    """One measurement of the kernels.

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
        """The fastest kernel first.

        For documents cuDNN comes after the other fused kernels, because its plans are not in the
        times. The reference is last where its scores did not fit in memory.
        """

        def key(kernel: str) -> tuple[bool, float]:
            after_others = self.mask is MaskKind.SPARSE and kernel == _BUILDS_PLANS
            return after_others, self.milliseconds[kernel]

        fastest_first = sorted(self.milliseconds, key=key)
        return (*fastest_first, *({"reference"} - set(fastest_first)))


@dataclass(frozen=True)
class MeasuredStripes:
    """One measurement of a kernel with several stripe sizes.

    speeds: relative to a baseline that is the same for all stripe sizes, by stripe size.
    """

    device: str
    kernel: str
    mask: MaskKind
    speeds: dict[StripeSize, float]
    source: str

    @property
    def fastest(self) -> StripeSize:
        """The fastest stripe size; 1 for single tokens."""
        return max(self.speeds, key=self.speeds.__getitem__)


SAME_GENERATION = {(9, 0): "NVIDIA H100 80GB HBM3"}
"""By compute capability, the measured GPU whose lines hold for others of its generation.

9.0 is Hopper: also H100 PCIe and NVL, H800, H200, GH200 and H20.
"""

# One thread of a CPU that multiplies in bf16; benchmarks/bench_gpu.py --device cpu --tokens 512
# --heads 4 --kv-heads 2 --head-dim 64 --ring-sizes 1 --packs 4096 --dtype fp32 --order-dtypes fp32
# bf16 fp64 --minutes 2 --rounds 2
_CPU = "commit 133eb48, torch 2.13.0"
# 32 query and 8 key-value heads, 8,192 tokens per rank, one of eight emulated ranks, single tokens;
# benchmarks/bench_gpu.py --tokens 8192 --ring-sizes 1 8 --packs 65536 --rounds 3
_H100 = "commit 58ca893, torch 2.11.0+cu130"

MEASURED = (
    Measured("cpu", torch.float32, MaskKind.CAUSAL, {"sdpa": 218.6, "reference": 951.2}, _CPU, 64),
    Measured("cpu", torch.float32, MaskKind.SPARSE, {"sdpa": 99.98, "reference": 654.9}, _CPU, 64),
    Measured("cpu", torch.bfloat16, MaskKind.CAUSAL, {"sdpa": 244.6, "reference": 444.9}, _CPU, 64),
    Measured("cpu", torch.bfloat16, MaskKind.SPARSE, {"sdpa": 174.1, "reference": 586.8}, _CPU, 64),
    Measured("cpu", torch.float64, MaskKind.CAUSAL, {"sdpa": 292.6, "reference": 1387}, _CPU, 64),
    Measured("cpu", torch.float64, MaskKind.SPARSE, {"sdpa": 167.2, "reference": 2299}, _CPU, 64),
    Measured(
        "NVIDIA H100 80GB HBM3",
        torch.bfloat16,
        MaskKind.CAUSAL,
        {"cudnn": 36.24, "sdpa": 60.49, "triton": 60.26},
        _H100,
    ),
    Measured(
        "NVIDIA H100 80GB HBM3",
        torch.bfloat16,
        MaskKind.SPARSE,
        {"cudnn": 49.11, "sdpa": 54.78, "triton": 17.87},
        _H100,
    ),
    Measured(
        "NVIDIA H100 80GB HBM3",
        torch.float16,
        MaskKind.CAUSAL,
        {"cudnn": 35.72, "sdpa": 59.18, "triton": 58.02},
        _H100,
    ),
    Measured(
        "NVIDIA H100 80GB HBM3",
        torch.float16,
        MaskKind.SPARSE,
        {"cudnn": 54.99, "sdpa": 45.04, "triton": 18.17},
        _H100,
    ),
)

# From the same run, in bf16. A causal mask: the rate relative to the fastest kernel on one GPU;
# WIDEST is the row of the zigzag layout, which has the same positions. Documents of 4,096 tokens on
# average in packs of 65,536: the speed relative to the contiguous ring that ignores them; wider
# stripes than 128 were not measured for these.
MEASURED_STRIPES = (
    MeasuredStripes(
        "NVIDIA H100 80GB HBM3",
        "cudnn",
        MaskKind.CAUSAL,
        {1: 0.924, 128: 0.381, WIDEST: 1.056},
        _H100,
    ),
    MeasuredStripes(
        "NVIDIA H100 80GB HBM3",
        "sdpa",
        MaskKind.CAUSAL,
        {1: 0.543, 128: 0.310, WIDEST: 0.608},
        _H100,
    ),
    MeasuredStripes(
        "NVIDIA H100 80GB HBM3",
        "triton",
        MaskKind.CAUSAL,
        {1: 0.557, 128: 0.551, WIDEST: 0.585},
        _H100,
    ),
    MeasuredStripes(
        "NVIDIA H100 80GB HBM3", "cudnn", MaskKind.SPARSE, {1: 0.908, 128: 0.547}, _H100
    ),
    MeasuredStripes(
        "NVIDIA H100 80GB HBM3", "sdpa", MaskKind.SPARSE, {1: 1.068, 128: 0.629}, _H100
    ),
    MeasuredStripes(
        "NVIDIA H100 80GB HBM3", "triton", MaskKind.SPARSE, {1: 3.189, 128: 3.348}, _H100
    ),
)
