"""Which device a run computes on and in which type, and why.

A CPU is fast in bf16 only with instructions for it (AVX-512 BF16, AMX): with them products run several times faster
than in fp32, without them a hundred times slower. In fp16 CPUs are never fast.
"""

from typing import NamedTuple

import torch

from megatron_ring.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision(NamedTuple):
    name: str
    dtype: torch.dtype
    reason: str


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def precision(asked: str, device: str) -> Precision:
    """The type for ``--dtype asked`` on ``device``; raises ConfigError for fp16 on a CPU."""
    if asked == "fp16" and device == "cpu":
        raise ConfigError(
            "dtype fp16 is emulated on a CPU, hundreds of times slower. Set --dtype auto, fp32 or bf16."
        )
    if asked != "auto":
        return Precision(asked, DTYPES[asked], "asked for")
    native = torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_multiplies_bf16()
    if native:
        return Precision("bf16", torch.bfloat16, f"this {device} multiplies bf16 natively")
    return Precision("fp32", torch.float32, f"this {device} has no bf16 instructions")


def _cpu_multiplies_bf16() -> bool:
    # torch has no public question for it yet; both functions exist since 2.6.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
