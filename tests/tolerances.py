"""The one table of tolerances: how far attention may be from the float64 oracle, by the type a kernel computes in.

Largest difference over the oracle's largest entry. The worst of some 1,800 runs (rings of 1 to 8, every layout, both
kernels, grouped heads, 2 to 530 tokens, standard normal inputs) was 7e-15, 9e-7 and 1.7e-2; the bfloat16 one is in dk
where four query heads share a key-value head. A test that needs more has found a bug.
"""

import torch

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2.5e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest entry, or over 1 where all entries are smaller (dq of a lone token is 0)."""
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1))


def beyond_tolerance(actual, expected, dtype: torch.dtype) -> dict[str, float]:
    """The errors, by name, that are not within ``dtype``'s tolerance (nan never is); both are named tuples."""
    errors = {name: error(getattr(actual, name), getattr(expected, name)) for name in actual._fields}
    return {name: value for name, value in errors.items() if not value <= TOLERANCE[dtype]}
