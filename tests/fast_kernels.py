"""The kernels that run on a CPU, fast enough for hundreds of test cases.

Triton's kernel is interpreted on a CPU, which is slow and single-threaded; test_triton.py tests a
selection of cases. Vendors' kernels have stand-ins in test_flash.py and test_torch_operators.py.
"""

from megatron_ring.kernels.attention import KERNELS
from megatron_ring.kernels.attention.registry import COLUMNS

FAST_KERNELS = {name: KERNELS[name] for name, device in COLUMNS if device == "cpu"}
