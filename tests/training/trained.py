"""The results of training, collected from all ranks and compared with those of one process."""

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_ring.parallel.tensor import split_of
from tests.training import tiny


class Tolerance(NamedTuple):
    """The largest relative error of a loss, of a gradient norm and of a parameter."""

    loss: float
    grad_norm: float
    parameter: float


TOLERANCE = Tolerance(1e-5, 1e-5, 1e-5)
"""For fp32 on a CPU."""


@dataclass(frozen=True)
class Part:
    """A rank's part of a parameter: a range of ``dim`` from ``start`` on, or all of it."""

    dim: int
    start: int
    values: torch.Tensor


@dataclass(frozen=True)
class Trained:
    """The results of one rank.

    steps: (loss, gradient norm) of each. validation: a loss sum after the last step. parts: of
    parameters, by their names in a whole GPT.
    """

    steps: list[tuple[float, float]]
    validation: float
    parts: dict[str, Part]

    @staticmethod
    def after(run: tiny.Run, steps: int) -> "Trained":
        """Train ``steps`` steps and validate. Collective."""
        return Trained(run.steps(steps), run.evaluate(), _parts(run))


def _parts(run: tiny.Run) -> dict[str, Part]:
    splits = {name: split_of(parameter) for name, parameter in run.named_parameters().items()}
    return {
        name: Part(split.dim, split.indices.start, values.cpu())
        if (split := splits[name])
        else Part(0, 0, values.cpu())
        for name, values in run.parameters().items()
    }


def differences(
    of_ranks: list[Trained], alone: Trained, tolerance: Tolerance = TOLERANCE
) -> list[str]:
    """Return numbers that differ from ``alone`` on any rank, and parameters whose copies differ."""
    copies = _copies(of_ranks)
    expected = _copies([alone])
    if copies.keys() != expected.keys():
        names = sorted(copies.keys() ^ expected.keys())
        return [f"parameters that only some ranks or only one process has: {names}"]
    actual_numbers = _numbers(of_ranks)
    expected_numbers = _numbers([alone])
    limits = {
        "loss of a step": tolerance.loss,
        "gradient norm of a step": tolerance.grad_norm,
        "validation loss": tolerance.loss,
    }
    errors = {
        name: _relative_error(actual_numbers[name], numbers)
        for name, numbers in expected_numbers.items()
    }
    for name, parts in expected.items():
        errors[name] = parameter_error(_assemble(copies[name]), _assemble(parts))
    found = [
        f"{name}: off by {error:.1e}"
        for name, error in errors.items()
        if not error <= limits.get(name, tolerance.parameter)
    ]
    found += [f"copies of {name} differ" for name, parts in copies.items() if not _are_same(parts)]
    return found


def _numbers(of_ranks: list[Trained]) -> dict[str, torch.Tensor]:
    """By name a tensor (ranks, numbers)."""
    lists = {
        "loss of a step": [[loss for loss, _ in trained.steps] for trained in of_ranks],
        "gradient norm of a step": [[norm for _, norm in trained.steps] for trained in of_ranks],
        "validation loss": [[trained.validation] for trained in of_ranks],
    }
    return {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in lists.items()}


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((actual - expected).abs() / expected.abs()).max())


def parameter_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest entry, or over 0.01 if all are smaller.

    0.01 is one step at the peak rate. The gradient of a key bias without RoPE is only rounding
    error, so its entries stay near zero.
    """
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=0.01))


def _copies(of_ranks: list[Trained]) -> dict[str, dict[int, list[Part]]]:
    """Return the ranks' copies of each part, by parameter name and start of the part."""
    found = defaultdict(lambda: defaultdict(list))
    for trained in of_ranks:
        for name, part in trained.parts.items():
            found[name][part.start].append(part)
    return found


def _are_same(parts: dict[int, list[Part]]) -> bool:
    return all(
        torch.equal(copies[0].values, copy.values) for copies in parts.values() for copy in copies
    )


def _assemble(parts: dict[int, list[Part]]) -> torch.Tensor:
    first = [parts[start][0] for start in sorted(parts)]
    return torch.cat([part.values for part in first], dim=first[0].dim)
