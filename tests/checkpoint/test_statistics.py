"""Norms, means and differences against NumPy in float64; what is not finite is left out and counted."""

import math

import numpy as np
import pytest
import torch

from megatron_ring.checkpoint import statistics
from megatron_ring.checkpoint.statistics import Difference, Statistics, difference

NAN, INF = math.nan, math.inf


@pytest.fixture(params=[3, 2**20], autouse=True)
def stretch(request, monkeypatch):
    """So short that every tensor here is several, and as it is."""
    monkeypatch.setattr(statistics, "_STRETCH", request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_those_of_the_finite_elements_in_float64(dtype):
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[0, 3], tensor[4, 6], tensor[2, 0] = NAN, INF, -INF
    finite = tensor[tensor.isfinite()].double().numpy()
    found = statistics.statistics(tensor)
    assert found.norm == pytest.approx(np.linalg.norm(finite), rel=1e-12)
    assert found.mean == pytest.approx(finite.mean(), rel=1e-12)
    assert (found.largest, found.not_finite) == (np.abs(finite).max(), 3)


def test_sums_are_not_of_the_tensor_s_own_type():
    """In float16 the squares are above its largest number, in bfloat16 ones are lost behind 256."""
    assert statistics.statistics(torch.full((100,), 300.0, dtype=torch.float16)).norm == 3000
    assert statistics.statistics(torch.ones(1000, dtype=torch.bfloat16)).mean == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([-3.0, 1.0], Statistics(math.sqrt(10), -1.0, 3.0, 0)),
        ([NAN, INF], Statistics(0.0, 0.0, 0.0, 2)),
        ([], Statistics(0.0, 0.0, 0.0, 0)),
    ],
)
def test_statistics_of_a_few(values, expected):
    assert statistics.statistics(torch.tensor(values, dtype=torch.float64)) == expected


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([3.0, 4.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0], Difference(True, 0.0, 0.0, 0)),
        ([3.0, 4.0, 0.0, 0.0], [3.0, 4.0, 0.0, -1.0], Difference(False, 0.2, 1.0, 0)),
        ([3.0, NAN, 0.0, 4.0], [3.0, NAN, 0.0, 4.0], Difference(True, 0.0, 0.0, 1)),
        ([3.0, NAN, 0.0, 4.0], [3.0, 5.0, 0.0, 4.0], Difference(False, 0.0, 0.0, 1)),
        ([3.0, INF, 0.0, 4.0], [3.0, -INF, 0.0, 4.0], Difference(False, 0.0, 0.0, 1)),
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0], Difference(False, None, 2.0, 0)),
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], Difference(True, 0.0, 0.0, 0)),
    ],
)
def test_how_far_two_are_apart(a, b, expected):
    assert difference(torch.tensor(a).view(2, 2), torch.tensor(b).view(2, 2)) == expected


def test_of_two_types_none_is_equal():
    ones = torch.ones(4)
    assert difference(ones, ones.bfloat16()) == Difference(False, 0.0, 0.0, 0)
