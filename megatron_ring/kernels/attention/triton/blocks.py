"""How many queries and keys a Triton program of each kernel takes at a time, by head size."""

from typing import Any, Literal, NamedTuple

import triton

Kernel = Literal["forward", "queries", "keys"]


class Blocks(NamedTuple):
    """Queries x keys of a tile; warps of a program; stages: blocks under way to shared memory at a time."""

    block_q: int
    block_k: int
    warps: int
    stages: int

    def settings(self, head: int) -> dict[str, Any]:
        """A launch's compile-time arguments."""
        interpreted = triton.knobs.runtime.interpret  # whose bfloat16 products are wrong
        return {
            "HEAD": head,
            "PADDED": max(16, triton.next_power_of_2(head)),
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "UPCAST": interpreted,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# Compiled for sm_80 and sm_90 these keep everything in registers (tests/kernels/attention/test_triton_compiled.py).
# Which of those that do is the fastest has not been measured: there was no GPU.
_TABLE: dict[Kernel, dict[int, Blocks]] = {
    "forward": {64: Blocks(128, 64, 8, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(64, 32, 8, 2)},
    "queries": {64: Blocks(128, 64, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 4, 1)},
    "keys": {64: Blocks(32, 128, 8, 2), 128: Blocks(32, 64, 8, 2), 256: Blocks(64, 32, 8, 1)},
}


def blocks_for(kernel: Kernel, head: int) -> Blocks:
    """For heads of this size, at most 256; sizes between take the next one's."""
    return next(sizes for largest, sizes in _TABLE[kernel].items() if head <= largest)
