"""Count the bytes that operators read from and write to memory, by category.

``MemoryTraffic`` is a dispatch mode: it sees every operator that runs below autograd, forward and
backward, and adds up the sizes of its tensors. It does not look at values, so it also counts on
the meta device, where a layer of any size takes no memory and no time.

An operator is charged each tensor it takes once and each tensor it returns or changes once, as a
kernel that keeps everything else in registers would move them. Views move nothing, an expanded
tensor counts its distinct elements, and an operator that fills memory does not read it. What a GPU
moves is at least this; caches may hold small tensors from one operator to the next.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATTENTION = "attention"
PRODUCTS = "matrix products"
ELEMENTWISE = "element-wise"
COPIES = "copies and casts"
CONCATENATIONS = "concatenations"
PACKING = "communication packing"
CATEGORIES = (ATTENTION, PRODUCTS, ELEMENTWISE, COPIES, CONCATENATIONS, PACKING)

_NAMES = {
    PRODUCTS: {"mm", "addmm", "addmm_", "bmm", "baddbmm"},
    COPIES: {"copy_", "_to_copy", "clone", "_foreach_copy_"},
    CONCATENATIONS: {"cat", "stack"},
}
# Functions that copy only to have tensors side by side in a message.
_PACKING_FUNCTIONS = {
    "pack_bytes",
    "unpack_bytes",
    "stack_to_kernel_layout",
    "all_to_all_heads",
}
# They change an argument without reading it, or allocate without writing.
_ONLY_WRITE = {"copy_", "zero_", "fill_", "_foreach_copy_"}
_ONLY_ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FILL_NEW = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_full"}
# They read as many elements of their first argument as they return.
_GATHER = {"embedding", "gather", "index_select"}


@dataclass
class Traffic:
    """Calls of operators, and the bytes they read and write."""

    calls: int = 0
    read: int = 0
    written: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.calls + other.calls, self.read + other.read, self.written + other.written
        )

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.calls - other.calls, self.read - other.read, self.written - other.written
        )


@dataclass
class Counts:
    """Traffic by category and operator name."""

    traffic: dict[tuple[str, str], Traffic] = field(default_factory=lambda: defaultdict(Traffic))

    def total(self, categories: Iterable[str] = CATEGORIES) -> Traffic:
        """Return the sum over all operators of some categories."""
        chosen = set(categories)
        parts = (x for (category, _), x in self.traffic.items() if category in chosen)
        return sum(parts, Traffic())

    def __sub__(self, other: "Counts") -> "Counts":
        keys = self.traffic.keys() | other.traffic.keys()
        result = Counts()
        for key in keys:
            result.traffic[key] = self.traffic[key] - other.traffic[key]
        return result


class MemoryTraffic(TorchDispatchMode):
    """Counts the operators that run while this mode is on.

    Attributes:
        counts: What has been counted so far.
        bodies: Operators that stand for several others, with a function that runs these.
        device_type: Operators without a tensor on such a device are not counted.
    """

    def __init__(
        self,
        bodies: Mapping[OpOverload, Callable[..., Any]] | None = None,
        device_type: str = "meta",
    ):
        super().__init__()
        self.device_type = device_type
        self.counts = Counts()
        self.bodies = bodies or {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator in self.bodies:
            with self:
                return self.bodies[operator](*args, **kwargs)
        results = operator(*args, **kwargs)
        traffic = _traffic(operator, args, kwargs, results)
        devices = {x.device.type for x in _tensors((args, kwargs, results))}
        if traffic.bytes and self.device_type in devices:
            key = (_category(operator), _name(operator))
            self.counts.traffic[key] += traffic
        return results


def size_of(x: torch.Tensor) -> int:
    """Return the bytes of the distinct elements of ``x``."""
    elements = 1
    for size, stride in zip(x.shape, x.stride()):
        elements *= size if stride else min(size, 1)
    return elements * x.itemsize


def _name(operator: OpOverload) -> str:
    return operator._schema.name.split("::")[-1]


def _category(operator: OpOverload) -> str:
    name = _name(operator)
    if "attention" in name:
        return ATTENTION
    for category, names in _NAMES.items():
        if name in names:
            moves = category in (COPIES, CONCATENATIONS)
            return PACKING if moves and _is_called_by(_PACKING_FUNCTIONS) else category
    return ELEMENTWISE


def _is_called_by(functions: set[str]) -> bool:
    frame = sys._getframe()
    while frame:
        if frame.f_code.co_name in functions:
            return True
        frame = frame.f_back
    return False


def _traffic(operator: OpOverload, args: tuple, kwargs: dict, results: Any) -> Traffic:
    name = _name(operator)
    arguments = operator._schema.arguments
    by_name = dict(zip((argument.name for argument in arguments), args)) | kwargs
    changed: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []
    for argument in arguments:
        tensors = _tensors(by_name.get(argument.name))
        if argument.is_write:
            changed += tensors
        if not (argument.is_write and (argument.is_out or name in _ONLY_WRITE)):
            inputs += tensors
    outputs = [
        x
        for value, returned in zip(_as_tuple(results), operator._schema.returns)
        if returned.alias_info is None
        for x in _tensors(value)
    ]
    if name in _ONLY_ALLOCATE or (not changed and _is_view(operator, inputs, outputs)):
        return Traffic()
    if name == "copy_" and _is_same_memory(*inputs, *changed):
        return Traffic()  # torch copies nothing: what x[i] += y assigns back to x[i]
    if name in _FILL_NEW:
        inputs = []
    if name in _GATHER:
        inputs = [*outputs, *inputs[1:]]
    if name == "scatter_add_":
        *_, indices, source = inputs
        return Traffic(1, size_of(indices) + 2 * size_of(source), size_of(source))
    read = sum(map(size_of, _distinct(inputs)))
    return Traffic(1, read, sum(map(size_of, [*changed, *outputs])))


def _is_view(operator: OpOverload, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Return whether an operator returns only memory that it was given."""
    if not outputs:
        return True
    given = {x.untyped_storage()._cdata for x in inputs}
    return all(x.untyped_storage()._cdata in given for x in outputs)


def _is_same_memory(source: torch.Tensor, to: torch.Tensor) -> bool:
    a, b = (
        (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype)
        for x in (source, to)
    )
    return a == b


def _distinct(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Drop a tensor that is passed twice, such as the factor of a square."""
    distinct = {
        (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): x for x in tensors
    }
    return list(distinct.values())


def _as_tuple(results: Any) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
