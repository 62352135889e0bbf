"""Covering sets: a few assignments in which every legal pair of option values occurs at least once.

Most bugs of a program with many options show in a pair of them, and the number of rows grows with
the longest lists of values, hardly with the number of options (Cohen et al. 1997, "The AETG
system": greedy, the best of some candidates). Legality is decided by a function of the caller;
``infeasible`` returns the combinations that are left out.
"""

import itertools
from collections.abc import Callable, Collection, Hashable, Iterator

Factors = dict[str, tuple]
"""The values of each factor. The first is its default; all defaults together are legal."""

Assignment = dict[str, Hashable]
"""A value for every factor, or for some of them (a combination)."""

Legal = Callable[[Assignment], bool]

# Candidate rows, each grown from another combination; the one that covers most is used.
_CANDIDATES = 6


def covering(
    factors: Factors, legal: Legal, strength: int = 2, changes: int = 2
) -> list[Assignment]:
    """Return legal assignments in which every feasible combination of ``strength`` values occurs.

    The result is the same on every call.
    """
    witnesses = _witnesses(factors, legal, strength, changes)
    missing = {_key(c): row for c, row in witnesses if row}
    rows = []
    while missing:
        seeds = list(missing.values())[:: -(-len(missing) // _CANDIDATES)]
        grown = [_grown(row, factors, legal, missing.keys(), strength) for row in seeds]
        rows.append(max(grown, key=lambda row: _gain(row, missing.keys(), strength)))
        for combination in _combinations_of(rows[-1], strength):
            missing.pop(combination, None)
    return _without_redundant(rows, strength)


def infeasible(
    factors: Factors, legal: Legal, strength: int = 2, changes: int = 2
) -> list[Assignment]:
    """Return the combinations of ``strength`` values for which ``witness`` finds no assignment."""
    return [
        combination
        for combination, row in _witnesses(factors, legal, strength, changes)
        if row is None
    ]


def witness(
    combination: Assignment, factors: Factors, legal: Legal, changes: int
) -> Assignment | None:
    """Return a legal assignment with ``combination`` and few other values that are not defaults.

    The product of all values is too large to search. Rules connect few factors, so a few changes
    (at most ``changes``) satisfy them. With as many changes as factors, None proves that there is
    no such assignment.
    """
    defaults = {name: values[0] for name, values in factors.items()} | combination
    free = [name for name in factors if name not in combination]
    for count in range(min(changes, len(free)) + 1):
        for names in itertools.combinations(free, count):
            for values in itertools.product(*(factors[name][1:] for name in names)):
                if legal(row := defaults | dict(zip(names, values, strict=True))):
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
    """Return the keys of the row's combinations, in the order of the factors."""
    return itertools.combinations(row.items(), strength)


def _gain(row: Assignment, missing: Collection[tuple], strength: int) -> int:
    return sum(combination in missing for combination in _combinations_of(row, strength))


def _grown(
    row: Assignment, factors: Factors, legal: Legal, missing: Collection[tuple], strength: int
) -> Assignment:
    """Change one value of ``row`` after another to cover most of ``missing``, until nothing helps.

    Of equally good values the current one stays, so that rows keep as many defaults as possible.
    """
    before = None
    while row != before:
        before = row
        for name, values in factors.items():
            others = [row | {name: value} for value in values]
            row = max([row, *filter(legal, others)], key=lambda r: _gain(r, missing, strength))
    return row


def _without_redundant(rows: list[Assignment], strength: int) -> list[Assignment]:
    """Return ``rows`` without those whose combinations all occur in others."""
    remaining = list(rows)
    for row in rows:
        others = {
            c for other in remaining if other is not row for c in _combinations_of(other, strength)
        }
        if all(c in others for c in _combinations_of(row, strength)):
            remaining.remove(row)
    return remaining
