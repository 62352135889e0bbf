"""A covering set has every combination that is legal at all, in few rows; the real ones lack only what is refused."""

import itertools

import pytest

from tests.training import factors
from tests.training.covering import covering, infeasible, witness

FREE = {"a": (0, 1, 2), "b": (0, 1, 2), "c": (0, 1), "d": (0, 1), "e": (0, 1)}


def everything_goes(row: dict) -> bool:
    return True


def odd_needs_company(row: dict) -> bool:
    """Ties factors pair by pair and three at a time: a = 1 with c = 1 only, b = 2 with d or e, never c with d."""
    return (
        (row["a"] != 1 or row["c"] == 1)
        and (row["b"] != 2 or row["d"] + row["e"] > 0)
        and row["c"] + row["d"] < 2
    )


def by_brute_force(legal, strength: int) -> set[tuple]:
    """Every combination of ``strength`` values that any legal assignment has."""
    rows = (dict(zip(FREE, values, strict=True)) for values in itertools.product(*FREE.values()))
    return {c for row in rows if legal(row) for c in itertools.combinations(row.items(), strength)}


@pytest.mark.parametrize("legal", [everything_goes, odd_needs_company])
@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_combination_that_is_legal_anywhere_is_in_a_row(legal, strength):
    rows = covering(FREE, legal, strength, changes=len(FREE))
    assert all(legal(row) for row in rows)
    assert {
        c for row in rows for c in itertools.combinations(row.items(), strength)
    } == by_brute_force(legal, strength)


def test_what_no_legal_assignment_has_is_infeasible():
    found = infeasible(FREE, odd_needs_company, changes=len(FREE))
    assert found == [{"a": 1, "c": 0}, {"a": 1, "d": 1}, {"c": 1, "d": 1}]


def test_rows_are_few():
    # Nine pairs of a and b need nine rows; the product has 72.
    assert len(covering(FREE, everything_goes)) <= 11
    assert len(covering(FREE, everything_goes, strength=1)) == 3


def test_a_witness_is_as_plain_as_can_be():
    assert witness({"a": 1}, FREE, odd_needs_company, 1) == {"a": 1, "b": 0, "c": 1, "d": 0, "e": 0}
    assert witness({"a": 1}, FREE, odd_needs_company, 0) is None


# Why pairs of values never meet, in the words of ``Setup.of``; the rest would be more processes than there are.
REFUSED = {
    "needs a layout, but context_parallel is none": {
        *(("ring", ring, "layout", "none") for ring in (2, 3, 4)),
        *(("ulysses", ulysses, "layout", "none") for ulysses in (2, 4)),
    },
    "has no effect while tensor_model_parallel_size is 1": {
        ("tensor", 1, "sequence_parallel", True)
    },
    "key-value heads are split over tensor ranks, not repeated": {
        ("tensor", 4, "key_value_heads", 2)
    },
    "splits gradients, but stages of pipeline_model_parallel_size": {
        ("pipe", pipe, "zero", zero) for pipe in (2, 4) for zero in (2, 3)
    },
    "needs zero_stage 3, which no pipeline takes": {
        ("pipe", pipe, "offload", "optimizer and parameters") for pipe in (2, 4)
    },
    "moves what ZeRO keeps of the optimizer": {("zero", 0, "offload", "optimizer")},
    "moves parameters that ZeRO 3 has split": {
        ("zero", zero, "offload", "optimizer and parameters") for zero in (0, 1, 2)
    },
}


def test_pairs_of_values_that_never_meet_are_refused_or_too_many_processes():
    expected = {pair: fragment for fragment, pairs in REFUSED.items() for pair in pairs}
    refused = set()
    for pair in infeasible(factors.FACTORS, factors.legal):
        row = factors.plain_but_for(**pair)
        if factors.world_size(row) <= 8:
            refused.add(names := sum(pair.items(), ()))
            assert any(expected[names] in message for message in factors.refusals(row)), names
    assert refused == expected.keys()


def pairs_of(row: dict) -> set[tuple]:
    return set(itertools.combinations(row.items(), 2))


def test_the_matrix_has_every_pair_that_is_not_refused():
    names = itertools.combinations(factors.FACTORS, 2)
    every = {
        ((a, x), (b, y)) for a, b in names for x in factors.FACTORS[a] for y in factors.FACTORS[b]
    }
    never = {tuple(pair.items()) for pair in infeasible(factors.FACTORS, factors.legal)}
    rows = factors.each_pair()
    assert all(map(factors.legal, rows))
    assert set().union(*map(pairs_of, rows)) == every - never
    assert len(rows) < 45


def test_the_quick_matrix_has_every_value():
    rows = factors.each_value()
    assert {item for row in rows for item in row.items()} == {
        (name, value) for name, values in factors.FACTORS.items() for value in values
    }
    assert max(map(factors.world_size, rows)) == 4


def test_a_row_alone_is_one_process_and_the_same_model():
    row = factors.each_pair()[0]
    alone, whole = factors.config(factors.alone(row)), factors.config(row)
    assert factors.world_size(factors.alone(row)) == 1
    assert (alone.model, alone.data) == (whole.model, whole.data)
    assert alone.training.global_batch_size == whole.training.global_batch_size
