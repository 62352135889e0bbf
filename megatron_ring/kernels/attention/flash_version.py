"""Which version of flash-attn computes on a machine, and why not the other."""

from dataclasses import dataclass

from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.support import Unsupported

# The first whose functions return (out, lse, ...) and take window_size_left and window_size_right.
_OLDEST = (2, 7)
_INSTALL = "pip install -U flash-attn --no-build-isolation, or set --attention-kernel auto"


@dataclass(frozen=True)
class FlashVersion:
    number: int
    reason: str


def flash_version(
    machine: Machine, head_dim: int, deterministic: bool
) -> FlashVersion | Unsupported:
    """Version 3 where it can serve, else version 2, else what is missing."""
    if not (why_not_3 := _why_not_3(machine, head_dim, deterministic)):
        return FlashVersion(3, "flash-attn 3 is installed and made for compute capability 9.0")
    if too_low := machine.below((8, 0)):
        return too_low
    if not machine.flash_2:
        return Unsupported(f"flash-attn 2 is not installed, and {why_not_3}", _INSTALL)
    if _numbers(machine.flash_2) < _OLDEST:
        return Unsupported(
            f"flash-attn {machine.flash_2} is older than 2.7, and {why_not_3}", _INSTALL
        )
    return FlashVersion(2, f"flash-attn {machine.flash_2}: {why_not_3}")


def _why_not_3(machine: Machine, head_dim: int, deterministic: bool) -> str:
    if not machine.flash_3:
        return "flash-attn 3 (the package flash_attn_3) is not installed"
    if machine.capability != (9, 0):
        return "flash-attn 3 is made for compute capability 9.0, not {}.{}".format(
            *machine.capability
        )
    if deterministic and head_dim > 192:
        return f"flash-attn 3 repeats itself for head sizes up to 192, not {head_dim}"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
