"""A covering set has every legal combination in few rows; the matrix lacks only illegal pairs."""

import itertools

import pytest

from tests.training import factors
from tests.training.covering import covering, infeasible, witness

FREE = {"a": (0, 1, 2), "b": (0, 1, 2), "c": (0, 1), "d": (0, 1), "e": (0, 1)}


def everything_is_legal(row: dict) -> bool:
    return True


def some_are_legal(row: dict) -> bool:
    """Rules of two and three factors: a = 1 only with c = 1, b = 2 with d or e, no c with d."""
    return (
        (row["a"] != 1 or row["c"] == 1)
        and (row["b"] != 2 or row["d"] + row["e"] > 0)
        and row["c"] + row["d"] < 2
    )


def all_legal_combinations(legal, strength: int) -> set[tuple]:
    """Return every combination of ``strength`` values that any legal assignment has."""
    rows = (dict(zip(FREE, values, strict=True)) for values in itertools.product(*FREE.values()))
    return {c for row in rows if legal(row) for c in itertools.combinations(row.items(), strength)}


@pytest.mark.parametrize("legal", [everything_is_legal, some_are_legal])
@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_legal_combination_is_in_a_row(legal, strength):
    rows = covering(FREE, legal, strength, changes=len(FREE))
    assert all(legal(row) for row in rows)
    assert {
        c for row in rows for c in itertools.combinations(row.items(), strength)
    } == all_legal_combinations(legal, strength)


def test_combinations_without_a_legal_assignment_are_infeasible():
    combinations = infeasible(FREE, some_are_legal, changes=len(FREE))
    assert combinations == [{"a": 1, "c": 0}, {"a": 1, "d": 1}, {"c": 1, "d": 1}]


def test_rows_are_few():
    # Nine pairs of a and b need nine rows; the product has 72.
    assert len(covering(FREE, everything_is_legal)) <= 11
    assert len(covering(FREE, everything_is_legal, strength=1)) == 3


def test_a_witness_has_as_few_changes_as_possible():
    assert witness({"a": 1}, FREE, some_are_legal, 1) == {"a": 1, "b": 0, "c": 1, "d": 0, "e": 0}
    assert witness({"a": 1}, FREE, some_are_legal, 0) is None


# The pairs of values that ``RunSettings.resolve`` refuses, by parts of its message. The other
# infeasible pairs would need too many processes.
REFUSED = {
    ("context_parallel_size", "--context-parallel striped"): {
        *(("ring", ring, "layout", "none") for ring in (2, 3, 4)),
        *(("ulysses", ulysses, "layout", "none") for ulysses in (2, 4)),
    },
    ("sequence_parallel", "tensor_model_parallel_size is 1"): {
        ("tensor", 1, "sequence_parallel", True)
    },
    ("num_query_groups 2", "tensor_model_parallel_size 4", "--num-query-groups"): {
        ("tensor", 4, "key_value_heads", 2)
    },
    ("zero_stage", "--zero-stage 1", "--pipeline-model-parallel-size 1"): {
        ("pipe", pipe, "zero", zero) for pipe in (2, 4) for zero in (2, 3)
    },
    ("offload_param", "--offload-param none", "--pipeline-model-parallel-size 1"): {
        ("pipe", pipe, "offload", "optimizer and parameters") for pipe in (2, 4)
    },
    ("zero_stage 0", "--zero-stage 1", "--offload-optimizer none"): {
        ("zero", 0, "offload", "optimizer")
    },
    ("offload_param", "--zero-stage 3", "--offload-param none"): {
        ("zero", zero, "offload", "optimizer and parameters") for zero in (0, 1, 2)
    },
}


def test_infeasible_pairs_are_refused_or_need_too_many_processes():
    expected = {pair: parts for parts, pairs in REFUSED.items() for pair in pairs}
    refused = set()
    for pair in infeasible(factors.FACTORS, factors.legal):
        row = factors.MATRIX.defaults_with(**pair)
        if factors.MATRIX.world_size(row) <= 8:
            names = sum(pair.items(), ())
            refused.add(names)
            assert any(
                all(part in message for part in expected[names])
                for message in factors.MATRIX.refusals(row)
            ), names
    assert refused == expected.keys()


def pairs_of(row: dict) -> set[tuple]:
    return set(itertools.combinations(row.items(), 2))


def test_the_matrix_has_every_feasible_pair():
    names = itertools.combinations(factors.FACTORS, 2)
    every = {
        ((a, x), (b, y)) for a, b in names for x in factors.FACTORS[a] for y in factors.FACTORS[b]
    }
    never_legal = {tuple(pair.items()) for pair in infeasible(factors.FACTORS, factors.legal)}
    rows = factors.each_pair()
    assert all(map(factors.legal, rows))
    assert set().union(*map(pairs_of, rows)) == every - never_legal
    assert len(rows) < 45


def test_the_quick_matrix_has_every_value():
    rows = factors.each_value()
    assert {item for row in rows for item in row.items()} == {
        (name, value) for name, values in factors.FACTORS.items() for value in values
    }
    assert max(map(factors.MATRIX.world_size, rows)) == 4


def test_the_one_process_counterpart_has_the_same_model_and_batch():
    row = factors.each_pair()[0]
    alone = factors.config(factors.MATRIX.one_process(row))
    whole = factors.config(row)
    assert factors.MATRIX.world_size(factors.MATRIX.one_process(row)) == 1
    assert (alone.model, alone.data) == (whole.model, whole.data)
    assert alone.training.global_batch_size == whole.training.global_batch_size
