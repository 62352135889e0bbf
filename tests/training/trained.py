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
        name: Part(split.dim, split.indices.start, values) if (split := splits[name]) else Part(0, 0, values)
        for name, values in run.parameters().items()
    }


def faults(of_ranks: list[Trained], alone: Trained) -> list[str]:
    """Every figure on any rank that is not ``alone``'s, and every parameter of which copies differ in a bit."""
    errors = {f"{name} of a step": _relative(_series(of_ranks, i), _series([alone], i)) for i, name in _STEP.items()}
    errors["validation loss"] = _relative(_validation(of_ranks), _validation([alone]))
    copies = _copies(of_ranks)
    expected = {name: part.values for name, part in alone.parts.items()}
    if copies.keys() != expected.keys():
        return [f"parameters held by no rank, or by no whole model: {sorted(copies.keys() ^ expected.keys())}"]
    errors |= {name: parameter_error(_whole(copies[name]), expected[name]) for name in expected}
    differing = [f"copies of {name} differ" for name, parts in copies.items() if not _alike(parts)]
    return [f"{what}: off by {error:.1e}" for what, error in errors.items() if not error <= TOLERANCE] + differing


_STEP = {0: "loss", 1: "gradient norm"}


def _series(of_ranks: list[Trained], i: int) -> torch.Tensor:
    return torch.tensor([[step[i] for step in trained.steps] for trained in of_ranks], dtype=torch.float64)


def _validation(of_ranks: list[Trained]) -> torch.Tensor:
    return torch.tensor([trained.validation for trained in of_ranks], dtype=torch.float64)


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
    return all(torch.equal(copies[0].values, copy.values) for copies in parts.values() for copy in copies)


def _whole(parts: dict[int, list[Part]]) -> torch.Tensor:
    first = [parts[start][0] for start in sorted(parts)]
    return torch.cat([part.values for part in first], dim=first[0].dim)
