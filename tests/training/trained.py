"""What a run leaves behind, rank by rank, put together again and compared with what one process left behind."""

from collections import defaultdict
from dataclasses import dataclass

import torch

from megatron_ring.parallel.tensor import split_of
from tests.training import tiny

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Part:
    """What a rank has of a parameter: a run of dimension ``dim`` from ``start`` on, or all of it."""

    dim: int
    start: int
    values: torch.Tensor


@dataclass(frozen=True)
class Trained:
    """steps: (loss, gradient norm) of each; validation: a loss sum after the last; parts: by names in a whole GPT."""

    steps: list[tuple[float, float]]
    validation: float
    parts: dict[str, Part]

    @staticmethod
    def after(run: tiny.Run, steps: int) -> "Trained":
        """Train and look; collective, as the run is."""
        return Trained(run.steps(steps), run.evaluate(), _parts(run))


def _parts(run: tiny.Run) -> dict[str, Part]:
    splits = {name: split_of(parameter) for name, parameter in run.named_parameters().items()}
    return {
        name: Part(split.dim, split.indices.start, values)
        if (split := splits[name])
        else Part(0, 0, values)
        for name, values in run.parameters().items()
    }


def faults(of_ranks: list[Trained], alone: Trained) -> list[str]:
    """Every figure that is not ``alone``'s on some rank, and every parameter whose copies differ in a bit."""
    copies, expected = _copies(of_ranks), _copies([alone])
    if copies.keys() != expected.keys():
        return [
            f"parameters of some ranks, or of one process, alone: {sorted(copies.keys() ^ expected.keys())}"
        ]
    actual, figures = _figures(of_ranks), _figures([alone])
    errors = {name: _relative(actual[name], figures[name]) for name in figures}
    errors |= {
        name: parameter_error(_whole(copies[name]), _whole(expected[name])) for name in expected
    }
    off = [
        f"{name}: off by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE
    ]
    return off + [f"copies of {name} differ" for name, parts in copies.items() if not _alike(parts)]


def _figures(of_ranks: list[Trained]) -> dict[str, torch.Tensor]:
    """By name: (ranks, as many as there are)."""
    found = {
        "loss of a step": [[loss for loss, _ in trained.steps] for trained in of_ranks],
        "gradient norm of a step": [[norm for _, norm in trained.steps] for trained in of_ranks],
        "validation loss": [[trained.validation] for trained in of_ranks],
    }
    return {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in found.items()}


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((actual - expected).abs() / expected.abs()).max())


def parameter_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest entry; over 0.01, a step at peak rate, where all entries are smaller.

    A bias of keys without RoPE has no gradient but rounding, and no entry to speak of.
    """
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=0.01))


def _copies(of_ranks: list[Trained]) -> dict[str, dict[int, list[Part]]]:
    """By name and by where a part begins: the ranks' copies of it."""
    found = defaultdict(lambda: defaultdict(list))
    for trained in of_ranks:
        for name, part in trained.parts.items():
            found[name][part.start].append(part)
    return found


def _alike(parts: dict[int, list[Part]]) -> bool:
    return all(
        torch.equal(copies[0].values, copy.values) for copies in parts.values() for copy in copies
    )


def _whole(parts: dict[int, list[Part]]) -> torch.Tensor:
    first = [parts[start][0] for start in sorted(parts)]
    return torch.cat([part.values for part in first], dim=first[0].dim)
