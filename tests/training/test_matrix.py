"""The parity matrix: on every grid, by every option, training steps and what they leave behind are one process's.

The rows are generated (covering.py) from the options (factors.py): a few in which each value occurs, and, marked whole,
those in which each pair of values does; one test has rows of three values that must meet. Rows of equally many
processes share these.

Where pairs meet, --steps-of-pairs are trained: 4, or 20 by ``make test-all``. A
wrong gradient shows in the first norm and a wrong update in the second loss. The comparison is of losses, gradient
norms, a validation and all parameters in fp32, to 1e-5 (trained.py).
"""

from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.training import factors, tiny
from tests.training.covering import Assignment
from tests.training.trained import Trained, faults

STEPS = 20
SIZES_OF_EACH_VALUE = [2, 3, 4]
SIZES_OF_EACH_PAIR = [1, 2, 4, 6, 8]

Row = tuple
"""An assignment's values: what can be a key."""


def train(
    rank: int, world_size: int, corpora: dict[str, Path], rows: list[Assignment], steps: int
) -> dict[Row, Trained]:
    """Every row in turn, each an engine of its own."""
    found = {}
    for row in rows:
        try:
            run = tiny.Run(factors.config(row), corpora[row["documents"]], rank, world_size)
            found[key(row)] = Trained.after(run, steps)
        except Exception as error:
            error.add_note(f"The row: {factors.described(row)}")
            raise
    return found


def key(row: Assignment) -> Row:
    return tuple(row.values())


class OneProcess:
    """What one process makes of the mathematics of rows in so many steps, each trained once."""

    def __init__(self, corpora: dict[str, Path], steps: int):
        self.corpora, self.steps = corpora, steps
        self.trained: dict[Row, Trained] = {}

    def train(self, rows: list[Assignment]) -> None:
        plain = {key(row): row for row in map(factors.alone, rows)}
        if missing := [row for row in plain.values() if key(row) not in self.trained]:
            self.trained |= run_ranks(1, train, self.corpora, missing, self.steps)[0]

    def counterpart(self, row: Assignment) -> Trained:
        return self.trained[key(factors.alone(row))]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpora")
    return {"ignored": tiny.write_store(folder), "kept apart": tiny.write_short_documents(folder)}


@pytest.fixture(scope="module")
def one_process(corpora) -> OneProcess:
    return OneProcess(corpora, STEPS)


@pytest.fixture(scope="module")
def one_process_of_pairs(corpora, pytestconfig) -> OneProcess:
    return OneProcess(corpora, pytestconfig.getoption("steps_of_pairs"))


def assert_all_like_one_process(
    rows: list[Assignment], world_size: int, one_process: OneProcess
) -> None:
    one_process.train(rows)  # all at once, since each number of processes would start another one
    own = [row for row in rows if factors.world_size(row) == world_size]
    of_ranks = run_ranks(world_size, train, one_process.corpora, own, one_process.steps)
    found = {
        factors.described(row): faults(
            [of_rank[key(row)] for of_rank in of_ranks], one_process.counterpart(row)
        )
        for row in own
    }
    assert not {row: wrong for row, wrong in found.items() if wrong}


@pytest.mark.parametrize("world_size", SIZES_OF_EACH_VALUE)
def test_each_value(world_size, one_process):
    assert_all_like_one_process(factors.each_value(), world_size, one_process)


@pytest.mark.whole
@pytest.mark.parametrize("world_size", SIZES_OF_EACH_PAIR)
def test_each_pair_of_values(world_size, one_process_of_pairs):
    assert_all_like_one_process(factors.each_pair(), world_size, one_process_of_pairs)


def test_the_norms_of_heads_over_tensor_ranks(one_process):
    """What each rank's heads ask of them is summed, whoever sees which tokens: three values, and pairs are two."""
    rows = [
        factors.plain_but_for(
            tensor=2, qk_layernorm=True, sequence_parallel=sequence_parallel, zero=zero
        )
        for sequence_parallel, zero in ((False, 0), (False, 3), (True, 3))
    ]
    assert_all_like_one_process(rows, 2, one_process)


def test_no_row_is_left_out():
    assert sorted(set(map(factors.world_size, factors.each_value()))) == SIZES_OF_EACH_VALUE
    assert sorted(set(map(factors.world_size, factors.each_pair()))) == SIZES_OF_EACH_PAIR
