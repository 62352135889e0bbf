"""The kernels that tests may run by the hundred: those that a CPU computes.

Triton's are interpreted here, which is slow and one at a time; test_triton.py has a choice of cases. Of vendors'
kernels test_flash.py and test_cudnn.py have stand-ins.
"""

from megatron_ring.kernels.attention import KERNELS
from megatron_ring.kernels.attention.support import COLUMNS

FAST_KERNELS = {name: KERNELS[name] for name, device in COLUMNS if device == "cpu"}
