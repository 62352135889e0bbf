"""What the launches of the element-wise kernels share: rows, warps and programs."""

import functools

import torch

ELEMENTS_PER_WARP = 512
"""Elements of a program for each of its warps: 16 a thread, two loads of 16 bytes in bf16."""

PROGRAMS_PER_PROCESSOR = 4
"""Programs of a kernel that sums over rows, for each multiprocessor of the GPU."""


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` as a matrix of rows whose elements are adjacent; copies only if it must."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def warps_for(elements: int) -> int:
    """Return the warps of a program: a power of two, 1 to 16."""
    return min(max(elements // ELEMENTS_PER_WARP, 1), 16)


def programs_for(device: torch.device, rows: int) -> int:
    """Return the programs over which ``rows`` are distributed, each of which sums its own."""
    return max(1, min(rows, PROGRAMS_PER_PROCESSOR * _processors(device)))


@functools.cache
def _processors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU; those of an H100 on the meta device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 1  # a CPU: the interpreter
