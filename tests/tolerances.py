"""Comparison of attention with the float64 oracle, by the package's table of tolerances.

A test that needs a larger tolerance than the table's has found a bug.
"""

import torch

from megatron_ring.kernels.attention.accuracy import TOLERANCE, error

__all__ = ["TOLERANCE", "beyond_tolerance", "error"]


def beyond_tolerance(actual, expected, dtype: torch.dtype) -> dict[str, float]:
    """Return the errors above ``dtype``'s tolerance, nan included, by field of the named tuples."""
    errors = {
        name: error(getattr(actual, name), getattr(expected, name)) for name in actual._fields
    }
    return {name: value for name, value in errors.items() if not value <= TOLERANCE[dtype]}
