"""The tolerances of attention and its gradients relative to float64, by the kernel's dtype.

Tests, the self-test at the start of a run and benchmarks all use this table. The largest errors of
some 1,800 runs (rings of 1 to 8, every layout, both CPU kernels, grouped heads, 2 to 530 tokens,
standard normal inputs) were 7e-15, 1.5e-6 and 2e-2 in float64, float32 and bfloat16; the bfloat16
one is in dk where four query heads share a key-value head.
"""

import torch

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2.5e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}

# The norm of a tensor's error varies less than its largest element, so its limit is lower.
_NORM_WEIGHT = 4
# Where gradients cancel out (dq of a token that sees only itself), the norm of their error is
# compared with this root mean square, if their own is smaller, and their largest error with 1.
_SMALLEST_RMS = 0.5


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the larger of two relative errors, to compare with ``TOLERANCE``; nan if any is.

    The first is the largest difference divided by the largest entry of ``expected``, or by 1 if all
    entries are smaller; it detects a single wrong element. The second is four times the norm of the
    difference divided by the norm of ``expected``; it detects small errors everywhere. Both assume
    inputs and output gradients of magnitude about 1.
    """
    expected = expected.detach().double()
    difference = actual.detach().double() - expected
    largest = difference.abs().max() / expected.abs().max().clamp(min=1)
    norm = expected.norm().clamp(min=_SMALLEST_RMS * expected.numel() ** 0.5)
    return float(torch.maximum(largest, _NORM_WEIGHT * difference.norm() / norm))
