"""Splitting the sequence changes nothing: twenty losses and gradient norms are one process's, on any grid."""

from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.training import tiny

LAYOUTS = {"ring": {}, "striped": {}, "striped by 3": {"stripe_size": 3}, "zigzag": {}}
STEPS = 20


def cases() -> dict[str, dict]:
    """Every layout with every ZeRO stage, and grids that split data as well, by a name for each."""
    found = {
        f"{name}, ZeRO {stage}": {
            "parallel": {"context_parallel": name.split()[0], **extra},
            "training": {"zero_stage": stage},
        }
        for name, extra in LAYOUTS.items()
        for stage in (0, 1, 2, 3)
    }
    found["four micro-batches"] = {"training": {"micro_batch_size": 1}}
    found["two data ranks at most"] = {"parallel": {"context_parallel_size": 2}, "training": {"micro_batch_size": 2}}
    found["no context"] = {"parallel": {"context_parallel": "none"}, "training": {"micro_batch_size": 1}}
    return found


def train_all(rank: int, world_size: int, prefix: Path) -> dict[str, list[tuple[float, float]]]:
    runs = {name: tiny.Run(tiny.config(**sections), prefix, rank, world_size) for name, sections in cases().items()}
    return {name: run.steps(STEPS) for name, run in runs.items()}


def train_alone(rank: int, world_size: int, prefix: Path) -> list[tuple[float, float]]:
    config = tiny.config(parallel={"context_parallel": "none"}, training={"zero_stage": 0})
    return tiny.Run(config, prefix, rank, world_size).steps(STEPS)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    return tiny.write_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def one_process(prefix) -> torch.Tensor:
    """(steps, 2): loss and gradient norm."""
    return torch.tensor(run_ranks(1, train_alone, prefix)[0], dtype=torch.float64)


def test_one_process_learns(one_process):
    assert one_process[-1, 0] < 0.75 * one_process[0, 0]


@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_and_gradient_norms_are_those_of_one_process(world_size, one_process, prefix):
    for of_rank in run_ranks(world_size, train_all, prefix):
        for name, found in of_rank.items():
            found = torch.tensor(found, dtype=torch.float64)
            torch.testing.assert_close(found, one_process, rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}")
