"""Checks that the sections of the config share, and the limits that hold for every option."""

import math
from dataclasses import fields
from typing import Any

from megatron_ring import untrusted
from megatron_ring.errors import flag

# The largest magnitude of a whole number, by option; the others have the default.
_MAX_INTEGER = {"seed": untrusted.LARGEST_INTEGER, "num_layers": 2**16, "world_size": 2**17}
_DEFAULT_MAX_INTEGER = 2**31 - 1


def unusable_values(section: Any) -> list[str]:
    """Return the problems of values that arithmetic, formatting or the file system would fail on.

    These are whole numbers beyond a limit, non-finite numbers, and text with a NUL.
    """
    problems = []
    for option in fields(section):
        value = getattr(section, option.name)
        for item in value if isinstance(value, tuple) else (value,):
            if rule := _violated_limit(option.name, item):
                problems.append(f"{option.name} {rule}. Set {flag(option.name)}.")
    return problems


def _violated_limit(name: str, value: Any) -> str | None:
    if isinstance(value, int):
        limit = _MAX_INTEGER.get(name, _DEFAULT_MAX_INTEGER)
        if abs(value) > limit:
            return f"{untrusted.shown(value)} must be a whole number of at most {limit}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} must be a finite number"
    if isinstance(value, str) and not _is_utf8_without_nul(value):
        return f"{untrusted.shown(value)} must be UTF-8 text without NUL"
    return None


def _is_utf8_without_nul(text: str) -> bool:
    # In a file name that is not UTF-8 Python replaces its bytes by surrogates, which cannot be
    # printed.
    has_surrogates = any("\ud800" <= character <= "\udfff" for character in text)
    return "\0" not in text and not has_surrogates


def negative(section: Any, *names: str) -> list[str]:
    """Return the problems of the named options that are below 0."""
    problems = []
    for name in names:
        value = getattr(section, name)
        if not value >= 0:  # NaN is refused too
            problems.append(f"{name} {value} must be at least 0. Set {flag(name)}.")
    return problems


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number in ascending order, in O(sqrt(number)).

    Other numbers, which their section reports, have none.
    """
    small = [n for n in range(1, math.isqrt(max(number, 0)) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
