"""How far attention and its gradients may be from float64, by the type that a kernel computes in.

The one table of tolerances: tests, the self-test at the start of a run and benchmarks use it. The
worst of some 1,800 runs (rings of 1 to 8, every layout, both CPU kernels, grouped heads, 2 to 530
tokens, standard normal inputs) was 7e-15, 1.5e-6 and 2e-2 in float64, float32 and bfloat16; the
bfloat16 one is in dk where four query heads share a key-value head.
"""

import torch

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2.5e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}

# The norm of a tensor's error varies less than its largest element, so less of it is allowed.
_NORM_WEIGHT = 4
# Gradients that cancel out (dq of a token that sees only itself) are compared with this root mean
# square where their own is smaller, and their largest error with 1.
_SMALLEST_RMS = 0.5


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The larger of two errors, for comparison with ``TOLERANCE``; nan if any element is.

    One is the largest difference over the largest entry of ``expected``, or over 1 where all
    entries are smaller: it finds a single wrong element. The other is four times the norm of the
    difference over the norm of ``expected``: it finds what is a little wrong everywhere. Both are
    for inputs and gradients of the output of about 1.
    """
    expected = expected.detach().double()
    difference = actual.detach().double() - expected
    largest = difference.abs().max() / expected.abs().max().clamp(min=1)
    norm = expected.norm().clamp(min=_SMALLEST_RMS * expected.numel() ** 0.5)
    return float(torch.maximum(largest, _NORM_WEIGHT * difference.norm() / norm))
