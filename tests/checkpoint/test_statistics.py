"""Statistics and differences equal NumPy's in float64; non-finite elements are counted instead."""

import math

import numpy as np
import pytest
import torch

from megatron_ring.checkpoint import statistics
from megatron_ring.checkpoint.statistics import Difference, Statistics, difference

NAN = math.nan
INF = math.inf


@pytest.fixture(params=[3, 2**20], autouse=True)
def chunk(request, monkeypatch):
    """Use chunks so small that every tensor here has several, and the real ones."""
    monkeypatch.setattr(statistics, "_CHUNK", request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_those_of_the_finite_elements_in_float64(dtype):
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[0, 3] = NAN
    tensor[4, 6] = INF
    tensor[2, 0] = -INF
    finite = tensor[tensor.isfinite()].double().numpy()
    found = statistics.statistics(tensor)
    assert found.norm == pytest.approx(np.linalg.norm(finite), rel=1e-12)
    assert found.mean == pytest.approx(finite.mean(), rel=1e-12)
    assert (found.largest, found.not_finite) == (np.abs(finite).max(), 3)


def test_sums_are_not_in_the_dtype_of_the_tensor():
    """The squares overflow in float16, and a bfloat16 sum of ones stops at 256."""
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
def test_statistics_of_a_few_values(values, expected):
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
def test_the_difference_of_two_tensors(a, b, expected):
    assert difference(torch.tensor(a).view(2, 2), torch.tensor(b).view(2, 2)) == expected


def test_tensors_of_different_dtypes_are_not_equal():
    ones = torch.ones(4)
    assert difference(ones, ones.bfloat16()) == Difference(False, 0.0, 0.0, 0)
