"""Equal tensors in different memory, and calls of vendors' operators to repeat with them."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from megatron_ring.kernels.memory_contract import Memory, VendorOperator

Call = tuple[VendorOperator, dict[str, Any]]


@contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """Collect the calls of vendors' operators, with their arguments."""
    calls: list[Call] = []
    original = VendorOperator.__call__

    def record(operator: VendorOperator, **arguments: Any) -> Any:
        calls.append((operator, arguments))
        return original(operator, **arguments)

    with mock.patch.object(VendorOperator, "__call__", record):
        yield calls


def forms(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors equal to ``x`` in other memory, surrounded by nan, with a name for each."""
    filling = math.nan if x.is_floating_point() else 0
    for dim in range(x.dim()):
        around = torch.full_like(x, filling, memory_format=torch.contiguous_format)
        yield (
            f"a slice of dimension {dim}",
            torch.cat([around, x, around], dim).narrow(dim, x.shape[dim], x.shape[dim]),
        )
    for first in range(x.dim()):
        for second in range(first + 1, x.dim()):
            swapped = x.transpose(first, second).clone(memory_format=torch.contiguous_format)
            yield (
                f"dimensions {first} and {second} swapped in memory",
                swapped.transpose(first, second),
            )
    yield "every second element", torch.stack([x, torch.full_like(x, filling)], -1)[..., 0]
    one = torch.full((1,), filling, dtype=x.dtype)
    yield "misaligned", torch.cat([one, x.flatten()])[1:].view(x.shape)


def outcome(operator: VendorOperator, arguments: Mapping[str, Any]) -> list[torch.Tensor] | str:
    """Return the tensors that a call returns or writes, or the class of what it raises.

    ``arguments`` are used up: some operators compute in place.
    """
    try:
        results = operator(**arguments)
    except Exception as error:
        return type(error).__name__
    results = results if isinstance(results, tuple) else (results,)
    written = [
        arguments[name]
        for name, memory in operator.memory.items()
        if memory.written and arguments.get(name) is not None
    ]
    return [x.detach().clone() for x in (*results, *written) if isinstance(x, torch.Tensor)]


def equal(actual: list[torch.Tensor] | str, expected: list[torch.Tensor]) -> bool:
    """Return whether two outcomes are equal up to the order of accumulation."""
    return not isinstance(actual, str) and all(
        torch.allclose(a.float(), b.float(), atol=2e-3, rtol=2e-3, equal_nan=True)
        for a, b in zip(actual, expected, strict=True)
    )


def misread_forms(call: Call, parameter: str, unstated: bool = False) -> list[str]:
    """Return the forms of one argument with which a call does not give what it gives as it is.

    A refusal by the contract of a tensor that the operator writes to is not among them.

    unstated: whether to call the operator with these forms as if nothing were stated about them.
    """
    operator, arguments = call
    expected = outcome(operator, _fresh(arguments))
    assert not isinstance(expected, str), expected
    if unstated:
        operator = without_statement(operator, parameter)
    found = []
    for name, form in forms(arguments[parameter]):
        actual = outcome(operator, {**_fresh(arguments), parameter: form})
        refused = operator.memory[parameter].written and actual == "ValueError"
        if not refused and not equal(actual, expected):
            found.append(name)
    return found


def _fresh(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: x.detach().clone().requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor)
        else x
        for name, x in arguments.items()
    }


def without_statement(operator: VendorOperator, parameter: str) -> VendorOperator:
    """Return the operator with nothing stated about the memory of one parameter."""
    unrestricted = Memory(written=operator.memory[parameter].written)
    return replace(operator, memory={**operator.memory, parameter: unrestricted})


def tensors(call: Call) -> list[str]:
    """Return the parameters of a call that are tensors of more than one element."""
    return [name for name, x in call[1].items() if isinstance(x, torch.Tensor) and x.numel() > 1]


def restricted(call: Call) -> list[str]:
    """Return the parameters of a call about whose memory something is stated."""
    operator, _ = call
    return [name for name in tensors(call) if operator.memory[name].dense]
