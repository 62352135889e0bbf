"""The count of packings: its rows, and what it refuses."""

import functools

import pytest

from benchmarks import count_packing
from megatron_ring.errors import ConfigError

SMALL = ["--seq-length", "1048576", "--documents", "8192", "--data-ranks", "2"]


@pytest.fixture
def run(run_main):
    """Return a function that runs the benchmark for its JSON and its output."""
    return functools.partial(run_main, count_packing, *SMALL)


def test_balanced_packs_are_as_full_as_those_of_best_fit_and_have_even_work(run):
    rows = {row["packing"]: row for row in run()[0]["rows"]}
    assert list(rows) == ["greedy", "best-fit", "balanced"]
    assert rows["balanced"]["padding"] == rows["best-fit"]["padding"] <= rows["greedy"]["padding"]
    assert 1 <= rows["balanced"]["in_order"] <= rows["balanced"]["largest"] < 1.1
    assert rows["best-fit"]["largest"] > 2
    # With one sample a rank in a step, there is nothing to exchange.
    assert all(row["in_order"] == row["by_work"] for row in rows.values())


def test_samples_that_fill_no_step_have_no_imbalance(run):
    document, printed = run("--data-ranks", "64")
    assert {row["by_work"] for row in document["rows"]} == {None}
    assert "8 data ranks" not in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--seq-length", "0"], "seq_length 0"), (["--data-ranks", "0"], "data_ranks 0")],
)
def test_sizes_below_one_are_refused(run, flags, message):
    with pytest.raises(ConfigError, match=message):
        run(*flags)
