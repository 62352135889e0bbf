"""What a vendor's kernel lacks on a machine: a package, a version, a compute capability."""

from collections.abc import Callable

from megatron_ring.kernels.attention.flash_version import flash_version
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.support import Unsupported

_OTHERWISE = "Set --attention-kernel sdpa, or auto"
_NEWER_TORCH = f"Install a torch for CUDA with cuDNN 9.0 or later. {_OTHERWISE}"


def missing(
    kernel: str, machine: Machine, head_dim: int, deterministic: bool
) -> Unsupported | None:
    """Why ``kernel`` cannot run on the GPU of ``machine``, None where it can."""
    return _LOOKED_UP[kernel](machine, head_dim, deterministic) if kernel in _LOOKED_UP else None


def _flash(machine: Machine, head_dim: int, deterministic: bool) -> Unsupported | None:
    version = flash_version(machine, head_dim, deterministic)
    return version if isinstance(version, Unsupported) else None


def _cudnn(machine: Machine, head_dim: int, deterministic: bool) -> Unsupported | None:
    """By torch's own conditions for its use (can_use_cudnn_attention in sdp_utils.cpp)."""
    if machine.cudnn == 0:
        return Unsupported("torch is built without cuDNN", _NEWER_TORCH)
    if machine.cudnn < 90000:
        return Unsupported(f"cuDNN {_said(machine.cudnn)} is older than 9.0", _NEWER_TORCH)
    if too_low := machine.below((8, 0)):
        return too_low
    if head_dim > 128 and not (machine.capability == (9, 0) and machine.cudnn >= 91000):
        only_there = "for larger ones it needs compute capability 9.0 and cuDNN 9.10"
        return Unsupported(
            f"it takes head sizes up to 128, not {head_dim}; {only_there}", _OTHERWISE
        )
    return None


def _triton(machine: Machine, head_dim: int, deterministic: bool) -> Unsupported | None:
    if machine.triton:
        return None
    return Unsupported(
        "triton is not installed", "pip install triton, or set --attention-kernel auto"
    )


_LOOKED_UP: dict[str, Callable[[Machine, int, bool], Unsupported | None]] = {
    "flash": _flash,
    "cudnn": _cudnn,
    "triton": _triton,
}


def _said(cudnn: int) -> str:
    """91002 is 9.10.2, and before 9.0 8907 is 8.9.7."""
    major = 10000 if cudnn >= 90000 else 1000
    return f"{cudnn // major}.{cudnn % major // 100}.{cudnn % 100}"
