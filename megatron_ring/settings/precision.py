"""The device type and compute dtype of a run, and the reason for the dtype.

A CPU is fast in bf16 only with instructions for it (AVX-512 BF16, AMX): with them matmuls are
several times faster than in fp32, without them a hundred times slower. CPUs are never fast in fp16.
"""

from typing import NamedTuple

import torch

from megatron_ring.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision(NamedTuple):
    """The compute dtype of a run; reason: why it was chosen, for the console."""

    name: str
    dtype: torch.dtype
    reason: str


def device_type() -> str:
    """Return "cuda" if torch sees a CUDA device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def precision(requested: str, device: str) -> Precision:
    """Resolve --dtype for a device type; raises ConfigError for fp16 on a CPU."""
    if requested == "fp16" and device == "cpu":
        raise ConfigError(
            "dtype fp16 is emulated on a CPU, hundreds of times slower. Set --dtype auto, fp32 or "
            "bf16."
        )
    if requested != "auto":
        return Precision(requested, DTYPES[requested], "set by --dtype")
    is_native = torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_multiplies_bf16()
    if is_native:
        return Precision("bf16", torch.bfloat16, f"this {device} multiplies bf16 natively")
    return Precision("fp32", torch.float32, f"this {device} has no bf16 instructions")


def _cpu_multiplies_bf16() -> bool:
    # torch has no public function for this; both private ones exist since 2.6.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
