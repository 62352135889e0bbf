"""What the operators of other libraries assume about the memory of their tensors, and its check.

Some libraries read a tensor by its strides, some copy it first, some refuse it, and some ignore its
strides and return wrong numbers. Every call of such an operator goes through a ``VendorOperator``,
which states for each tensor what the operator assumes (``Memory``) and copies the tensors that do
not meet it, and no others (docs/decisions/0023).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

HALF_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Memory:
    """What an operator assumes about the memory of one tensor; by default nothing.

    dense: the dimensions that the operator walks through without reading their strides, from the
        outermost to the innermost. They must be dense among themselves; the strides of the other
        dimensions are free. ``(-1,)`` stands for adjacent elements in the last dimension.
    alignment: bytes of which the address must be a multiple, and each stride but the innermost.
    dtypes: the supported ones; empty for all.
    written: whether the operator writes to the tensor, so that a copy cannot take its place.
    """

    dense: tuple[int, ...] = ()
    alignment: int = 1
    dtypes: tuple[torch.dtype, ...] = ()
    written: bool = False

    def holds_for(self, x: torch.Tensor) -> bool:
        """Return whether ``x`` can be passed as it is; its dtype is not checked."""
        return x.numel() == 0 or (self._is_dense(x) and self._is_aligned(x))

    def _is_dense(self, x: torch.Tensor) -> bool:
        stride = 1
        for dim in reversed(self.dense):
            if x.shape[dim] > 1 and x.stride(dim) != stride:
                return False
            stride *= x.shape[dim]
        return True

    def _is_aligned(self, x: torch.Tensor) -> bool:
        # Allocators align more strictly than any operator requires, so the offset decides. Unlike
        # the address, tensors without data have it too.
        innermost = self.dense[-1] % x.dim() if self.dense else None
        steps = [x.stride(d) for d in range(x.dim()) if x.shape[d] > 1 and d != innermost]
        return all(n * x.itemsize % self.alignment == 0 for n in (x.storage_offset(), *steps))

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """Copy ``x`` so that it can be passed; dimensions it is broadcast over are not multiplied.

        Differentiable. Raises ValueError if the shape allows no alignment.
        """
        dense = [dim % x.dim() for dim in self.dense]
        outer = [dim for dim in range(x.dim()) if dim not in dense]
        order = outer + dense
        once = x
        for dim in outer:
            if x.stride(dim) == 0:
                once = once.narrow(dim, 0, 1)
        copied = once.permute(order).clone(memory_format=torch.contiguous_format)
        surplus = -x.shape[order[-1]] % max(self.alignment // x.itemsize, 1)
        if surplus and len(dense) == 1:  # the rows are dense, and their distance is free
            copied = pad(copied, (0, surplus))[..., : x.shape[order[-1]]]
        copied = copied.permute([order.index(dim) for dim in range(x.dim())]).expand(x.shape)
        if not self.holds_for(copied):
            raise ValueError(
                f"no copy of shape {tuple(x.shape)} in {x.dtype} has strides that are multiples of "
                f"{self.alignment} bytes"
            )
        return copied


UNRESTRICTED = Memory()


@dataclass(frozen=True)
class VendorOperator:
    """An operator of another library, called by the names of its parameters.

    name: for messages. function: the operator.
    memory: what it assumes about each of its tensors, by parameter. A tensor without an entry is
        refused, so that none is passed unconsidered.
    """

    name: str
    function: Callable[..., Any]
    memory: Mapping[str, Memory]

    def __call__(self, **arguments: Any) -> Any:
        """Call the operator, with copies of the tensors whose memory does not meet ``memory``.

        Raises TypeError for a tensor that has no entry or an unsupported dtype, and ValueError for
        one that a copy cannot replace.
        """
        for parameter, value in arguments.items():
            if isinstance(value, torch.Tensor):
                arguments[parameter] = self._prepared(parameter, value)
        return self.function(**arguments)

    def _prepared(self, parameter: str, x: torch.Tensor) -> torch.Tensor:
        memory = self.memory.get(parameter)
        if memory is None:
            raise TypeError(f"{self.name}: nothing is stated about the memory of {parameter}")
        if memory.dtypes and x.dtype not in memory.dtypes:
            supported = ", ".join(map(str, memory.dtypes))
            raise TypeError(f"{self.name}: {parameter} is {x.dtype}; supported: {supported}")
        if memory.holds_for(x):
            return x
        if memory.written:
            raise ValueError(
                f"{self.name} writes to {parameter}, whose strides {tuple(x.stride())} for shape "
                f"{tuple(x.shape)} it does not support"
            )
        return memory.copy(x)
