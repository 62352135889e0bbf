"""The kernels that tests may run by the hundred: all but Triton's, which are interpreted where there is no GPU.

The interpreter is slow, and runs one kernel at a time. tests/kernels/attention/test_triton.py has a choice of cases.
"""

from megatron_ring.kernels.attention import KERNELS

FAST_KERNELS = {name: kernel for name, kernel in KERNELS.items() if name != "triton"}
