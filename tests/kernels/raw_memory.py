"""Reading a tensor as a compiled kernel does: from its address, with the strides it looks at.

The stand-ins for vendors' operators read their tensors through these functions, so that a view that
the real operator would misread gives wrong numbers here too, or ends outside of its memory.
"""

from collections.abc import Sequence

import torch


def read_with_strides(x: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """Return the elements at ``strides`` from the address of ``x``; raise where there is no memory.

    The real kernel would read whatever comes after, or fail on an illegal address.
    """
    return x.as_strided(x.shape, tuple(strides))


def read_as_dense(x: torch.Tensor, order: Sequence[int] | None = None) -> torch.Tensor:
    """Read ``x`` as if some dimensions were dense, outermost first; all of them by default.

    The strides of the other dimensions are those of ``x``.
    """
    strides = list(x.stride())
    step = 1
    for dim in reversed(range(x.dim()) if order is None else order):
        strides[dim] = step
        step *= x.shape[dim]
    return read_with_strides(x, strides)


def refuse_strided_rows(**tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError, as the libraries do, unless the last dimension of each is contiguous."""
    for name, x in tensors.items():
        if x is not None and x.stride(-1) != 1:
            raise RuntimeError(f"{name} must have a contiguous last dimension")


def refuse_misaligned(elements: int, **tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError unless offset and outer strides are multiples of so many elements."""
    for name, x in tensors.items():
        if x is None:
            continue
        steps = [stride for size, stride in zip(x.shape, x.stride()[:-1]) if size > 1]
        if any(step % elements for step in (x.storage_offset(), *steps)):
            raise RuntimeError(f"{name} is not correctly aligned")
