"""Values that are nan or infinite are counted in any dtype, and never written to a checkpoint."""

import math

import pytest
import torch

from megatron_ring.checkpoint import store
from megatron_ring.checkpoint.finite import NonFiniteTensor, check_finite, count_non_finite
from megatron_ring.checkpoint.tensors import KINDS
from megatron_ring.errors import CheckpointError
from tests.checkpoint import imagined

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "bad", [[], [math.nan], [math.inf], [math.inf, -math.inf], [math.nan, -math.inf, math.inf]]
)
def test_non_finite_values_are_counted(dtype, bad):
    values = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    values.view(-1)[5 : 5 + len(bad)] = torch.tensor(bad, dtype=dtype)
    assert count_non_finite(values) == len(bad)
    assert count_non_finite(values.T) == len(bad)


@pytest.mark.parametrize("dtype", TYPES)
def test_finite_values_whose_sum_overflows_count_as_finite(dtype):
    assert count_non_finite(torch.full((9,), torch.finfo(dtype).max, dtype=dtype)) == 0
    assert count_non_finite(torch.tensor([])) == 0


def test_the_error_has_the_name_and_the_count():
    with pytest.raises(NonFiniteTensor, match="norm has 2 values that are nan or infinite"):
        check_finite(torch.tensor([1.0, math.nan, math.inf]), "norm")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_non_finite_values_is_not_written(tmp_path, kind):
    kinds = {name: imagined.weights(seed) for seed, name in enumerate(KINDS)}
    before = imagined.write(tmp_path, 5, kinds)
    kinds[kind]["norm.weight"][2] = math.nan
    with pytest.raises(CheckpointError, match=f"{kind}/norm.weight.* has 1 value that is nan"):
        imagined.write(tmp_path, 10, kinds)
    assert store.newest(tmp_path).path == before
