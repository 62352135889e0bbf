"""Rows of the GPU tests can have every value on an H100, and on a CPU those that it supports."""

from dataclasses import replace

import pytest
import torch

from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.settings import run_settings
from tests.gpu import factors
from tests.training.covering import infeasible
from tests.training.matrix import Matrix


@pytest.fixture
def h100(monkeypatch) -> None:
    """Options are resolved as on an H100 without flash-attn."""
    gpu = replace(
        Machine(), gpu="NVIDIA H100 80GB HBM3", capability=(9, 0), cudnn=91900, triton=True
    )
    monkeypatch.setattr(run_settings, "device_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: gpu))


def illegal_values(processes: int) -> set[tuple]:
    """Return the values of factors that no row on up to so many processes can have."""
    # A matrix of its own, because it remembers what is legal on the device of the test.
    matrix = Matrix(factors.FACTORS, factors.MATHEMATICS, factors.config)
    found = infeasible(factors.FACTORS, lambda row: matrix.is_legal(row, processes), strength=1)
    return {item for combination in found for item in combination.items()}


def test_on_an_h100_only_kernels_that_are_not_installed_are_left_out(h100):
    assert illegal_values(processes=4) == {("kernel", "flash")}


def test_on_a_cpu_what_only_a_gpu_has_is_left_out():
    assert illegal_values(processes=4) == {
        ("kernel", "cudnn"),
        ("kernel", "triton"),
        ("kernel", "flash"),
        ("operations", "triton"),
        ("operations", "liger"),
        ("offload", "activations"),
        ("dtype", "fp16"),
    }


def test_every_row_and_its_counterpart_have_a_tolerance():
    for row in factors.rows("cpu"):
        assert factors.tolerance(row) == factors.tolerance(factors.MATRIX.one_process(row))
