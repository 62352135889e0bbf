"""The selection engine: the first usable candidate, the reasons against the others, and caveats."""

import enum

from megatron_ring.kernels.selection import (
    Assessment,
    Unsupported,
    Validation,
    first_usable,
    installed_version,
    refusals,
)


class Color(enum.Enum):
    RED = "red"
    GREEN = "green"


TOO_BRIGHT = Unsupported("too bright", "Set --dim")
BROKEN = Unsupported("broken", "Install it")


def assessment(red, green, unavailable=None) -> Assessment:
    return Assessment({Color.RED: red, Color.GREEN: green}, unavailable)


TESTED = assessment(Validation.TESTED, Validation.TESTED)


def test_the_first_candidate_that_supports_everything_is_selected():
    partial = assessment(TOO_BRIGHT, Validation.TESTED)
    broken = assessment(Validation.TESTED, Validation.TESTED, BROKEN)
    assert first_usable({"partial": partial, "broken": broken, "a": TESTED, "b": TESTED}) == "a"
    assert first_usable({"partial": partial, "broken": broken}) is None


def test_each_reason_is_given_once_with_its_implementations_and_requirements():
    candidates = {
        "first": assessment(TOO_BRIGHT, TOO_BRIGHT),
        "second": assessment(TOO_BRIGHT, Validation.TESTED, BROKEN),
        "chosen": TESTED,
        "never reached": assessment(Validation.TESTED, TOO_BRIGHT, BROKEN),
    }
    too_bright, broken = refusals(candidates, before="chosen")
    assert too_bright.cause is TOO_BRIGHT
    assert too_bright.implementations == ["first", "second"]
    assert too_bright.requirements == ["red", "green"]
    assert broken.cause is BROKEN
    assert (broken.implementations, broken.requirements) == (["second"], [])
    assert refusals({"chosen": TESTED}, before="chosen") == []


def test_untested_requirements_have_a_caveat():
    mixed = assessment(Validation.UNPROVEN, Validation.INTERPRETED)
    assert list(mixed.caveats()) == [
        (Validation.INTERPRETED, ["green"]),
        (Validation.UNPROVEN, ["red"]),
    ]
    assert list(TESTED.caveats()) == []
    assert all(one.caveat for one in Validation if one is not Validation.TESTED)


def test_a_distribution_that_is_not_installed_has_no_version():
    assert installed_version("torch")
    assert installed_version("a-distribution-that-does-not-exist") == ""
