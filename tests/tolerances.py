"""Comparison of attention with the float64 oracle, by the package's own table of tolerances.

A test that needs more than the table allows has found a bug.
"""

import torch

from megatron_ring.kernels.attention.accuracy import TOLERANCE, error

__all__ = ["TOLERANCE", "beyond_tolerance", "error"]


def beyond_tolerance(actual, expected, dtype: torch.dtype) -> dict[str, float]:
    """The errors, by name, that are not within ``dtype``'s tolerance (nan never is); both are named tuples."""
    errors = {
        name: error(getattr(actual, name), getattr(expected, name)) for name in actual._fields
    }
    return {name: value for name, value in errors.items() if not value <= TOLERANCE[dtype]}
