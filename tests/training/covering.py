"""Covering sets: few assignments in which all that can meet does meet, each pair of values in at least one of them.

Most faults of a program with many options show when two of them meet, and the rows that it takes grow with the longest
lists of values, hardly with the number of options (Cohen et al. 1997, "The AETG system": greedy, the best of some
candidates). What is legal is asked, never known: ``infeasible`` says what is left out.
"""

import itertools
from collections.abc import Callable, Collection, Hashable, Iterator

Factors = dict[str, tuple]
"""The values of each factor. The first is its plain value; all plain values together are legal."""

Assignment = dict[str, Hashable]
"""A value for every factor; for some of them, where it says combination."""

Legal = Callable[[Assignment], bool]

# Rows that are begun from different combinations, of which the one that covers most is taken.
_BEGINNINGS = 6


def covering(
    factors: Factors, legal: Legal, strength: int = 2, changes: int = 2
) -> list[Assignment]:
    """Legal assignments in which every feasible combination of ``strength`` values occurs; the same every time."""
    witnesses = _witnesses(factors, legal, strength, changes)
    missing = {_key(c): row for c, row in witnesses if row}
    rows = []
    while missing:
        beginnings = list(missing.values())[:: -(-len(missing) // _BEGINNINGS)]
        grown = [_grown(row, factors, legal, missing.keys(), strength) for row in beginnings]
        rows.append(max(grown, key=lambda row: _gain(row, missing.keys(), strength)))
        for combination in _combinations_of(rows[-1], strength):
            missing.pop(combination, None)
    return _without_spare(rows, strength)


def infeasible(
    factors: Factors, legal: Legal, strength: int = 2, changes: int = 2
) -> list[Assignment]:
    """The combinations of ``strength`` values that no legal assignment has, as far as ``witness`` looks."""
    return [
        combination
        for combination, row in _witnesses(factors, legal, strength, changes)
        if row is None
    ]


def witness(
    combination: Assignment, factors: Factors, legal: Legal, changes: int
) -> Assignment | None:
    """A legal assignment with ``combination``, plain but for it and for at most ``changes`` more factors.

    The product of all values is too large to search; rules tie few factors, so a few changes meet what they ask.
    With as many changes as factors None is a proof.
    """
    plain = {name: values[0] for name, values in factors.items()} | combination
    free = [name for name in factors if name not in combination]
    for count in range(min(changes, len(free)) + 1):
        for names in itertools.combinations(free, count):
            for values in itertools.product(*(factors[name][1:] for name in names)):
                if legal(row := plain | dict(zip(names, values, strict=True))):
                    return row
    return None


def _witnesses(
    factors: Factors, legal: Legal, strength: int, changes: int
) -> Iterator[tuple[Assignment, Assignment | None]]:
    for names in itertools.combinations(factors, strength):
        for values in itertools.product(*(factors[name] for name in names)):
            combination = dict(zip(names, values, strict=True))
            yield combination, witness(combination, factors, legal, changes)


def _key(combination: Assignment) -> tuple:
    return tuple(combination.items())


def _combinations_of(row: Assignment, strength: int) -> Iterator[tuple]:
    """Their keys: factors in the order of the row, which is that of the factors."""
    return itertools.combinations(row.items(), strength)


def _gain(row: Assignment, missing: Collection[tuple], strength: int) -> int:
    return sum(combination in missing for combination in _combinations_of(row, strength))


def _grown(
    row: Assignment, factors: Factors, legal: Legal, missing: Collection[tuple], strength: int
) -> Assignment:
    """``row`` with one value after another changed for what covers most of ``missing``, until no change helps.

    Of equally good values the first in its list stays, so that rows are as plain as may be.
    """
    before = None
    while row != before:
        before = row
        for name, values in factors.items():
            others = [row | {name: value} for value in values]
            row = max([row, *filter(legal, others)], key=lambda r: _gain(r, missing, strength))
    return row


def _without_spare(rows: list[Assignment], strength: int) -> list[Assignment]:
    """``rows`` less those whose combinations all occur in others."""
    kept = list(rows)
    for row in rows:
        others = {
            c for other in kept if other is not row for c in _combinations_of(other, strength)
        }
        if all(c in others for c in _combinations_of(row, strength)):
            kept.remove(row)
    return kept
