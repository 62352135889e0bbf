"""The parity matrix: on every grid and with every option, training equals that of one process.

The rows are generated (covering.py) from the options (factors.py) and trained by matrix.py: a few
in which each value occurs, and, marked whole, those in which each pair of values does; one test has
rows for combinations of three values.

Rows of pairs train --steps-of-pairs steps: 2, or 20 in ``make test-all``, which also trains the
rows that are marked exhaustive: without them 85% of the pairs occur. A wrong gradient shows in the
first norm, a wrong update in the second loss, and wrong moments of Adam in the parameters after the
second step. Compared are losses, gradient norms, a validation loss and all parameters in fp32, to
1e-5 (trained.py).
"""

from pathlib import Path

import pytest

from tests.training import factors, tiny
from tests.training.covering import Assignment
from tests.training.matrix import OneProcess
from tests.training.trained import TOLERANCE

STEPS = 3
SIZES_OF_EACH_VALUE = [2, 3, 4]
SIZES_OF_EACH_PAIR = [1, 2, 4, 6, 8]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpora")
    return {"ignored": tiny.write_store(folder), "masked": tiny.write_short_documents(folder)}


@pytest.fixture(scope="module")
def one_process(corpora) -> OneProcess:
    return OneProcess(factors.MATRIX, corpora, STEPS)


@pytest.fixture(scope="module")
def one_process_of_pairs(corpora, pytestconfig) -> OneProcess:
    return OneProcess(factors.MATRIX, corpora, pytestconfig.getoption("steps_of_pairs"))


def assert_equal_to_one_process(
    rows: list[Assignment], world_size: int, one_process: OneProcess
) -> None:
    assert one_process.compare(rows, world_size, lambda row: TOLERANCE).differences == {}


@pytest.mark.parametrize("world_size", SIZES_OF_EACH_VALUE)
def test_each_value_trains_as_one_process(world_size, one_process):
    assert_equal_to_one_process(factors.each_value(), world_size, one_process)


# The rows of eight processes take longest. The first of them cover most of the pairs.
FIRST_ROWS = 6
EACH_PAIR = [
    *(pytest.param(size, slice(None), marks=pytest.mark.whole) for size in SIZES_OF_EACH_PAIR[:-1]),
    pytest.param(8, slice(FIRST_ROWS), marks=pytest.mark.whole),
    pytest.param(8, slice(FIRST_ROWS, None), marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("world_size", "part"), EACH_PAIR)
def test_each_pair_of_values_trains_as_one_process(world_size, part, one_process_of_pairs):
    rows = [row for row in factors.each_pair() if factors.MATRIX.world_size(row) == world_size]
    assert_equal_to_one_process(rows[part], world_size, one_process_of_pairs)


def test_qk_layernorm_over_tensor_ranks_trains_as_one_process(one_process):
    """Gradients of its weights add up over the ranks' heads. This takes three factors."""
    rows = [
        factors.MATRIX.defaults_with(
            tensor=2, qk_layernorm=True, sequence_parallel=sequence_parallel, zero=zero
        )
        for sequence_parallel, zero in ((False, 0), (False, 3), (True, 3))
    ]
    assert_equal_to_one_process(rows, 2, one_process)


def test_the_sizes_above_cover_every_row():
    assert sorted(set(map(factors.MATRIX.world_size, factors.each_value()))) == SIZES_OF_EACH_VALUE
    assert sorted(set(map(factors.MATRIX.world_size, factors.each_pair()))) == SIZES_OF_EACH_PAIR
