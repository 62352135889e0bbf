"""The block sizes of the Triton kernels, by head dim and GPU generation."""

from typing import Any, Literal, NamedTuple

import torch
import triton

Kernel = Literal["forward", "fused", "queries", "keys"]
"""fused: dQ, dK and dV in one kernel. queries, keys: dQ alone, and dK and dV."""
Generation = Literal["ampere", "hopper"]


class Blocks(NamedTuple):
    """The tile of a program and its resources.

    block_q, block_k: queries and keys of a tile. warps: those of a program.
    stages: the number of blocks in flight to shared memory.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int

    def settings(self, head_dim: int) -> dict[str, Any]:
        """Return the compile-time arguments of a launch."""
        return {
            "HEAD_DIM": head_dim,
            "PADDED": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            # The interpreter's bfloat16 products are wrong.
            "UPCAST": triton.knobs.runtime.interpret,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# Compiled for sm_80 and sm_90, none of these spills a register in an innermost loop, except three
# moves of one kernel with Triton 3.9 (docs/decisions/0015 and 0023, with the other requirements).
# Larger heads than those of its rows leave too few registers for a fused kernel. Which sizes are
# the fastest has not been measured: benchmarks/tune_blocks.py does that on a GPU.
TABLE: dict[Generation, dict[Kernel, dict[int, Blocks]]] = {
    "ampere": {
        "forward": {
            64: Blocks(128, 64, 8, 3),
            128: Blocks(128, 64, 8, 3),
            256: Blocks(64, 32, 8, 2),
        },
        "fused": {64: Blocks(32, 128, 8, 2)},
        "queries": {
            64: Blocks(128, 64, 8, 2),
            128: Blocks(128, 32, 8, 2),
            256: Blocks(32, 32, 4, 1),
        },
        "keys": {64: Blocks(32, 128, 8, 2), 128: Blocks(32, 128, 8, 2), 256: Blocks(64, 32, 8, 1)},
    },
    "hopper": {
        "forward": {
            64: Blocks(128, 64, 8, 3),
            128: Blocks(128, 64, 8, 3),
            256: Blocks(128, 32, 8, 2),
        },
        "fused": {64: Blocks(64, 128, 8, 2), 128: Blocks(32, 128, 8, 2)},
        "queries": {
            64: Blocks(128, 64, 8, 2),
            128: Blocks(128, 64, 8, 2),
            256: Blocks(128, 32, 8, 2),
        },
        "keys": {64: Blocks(64, 128, 8, 2), 128: Blocks(32, 128, 8, 2), 256: Blocks(64, 32, 8, 1)},
    },
}


def generation_of(device: torch.device) -> Generation:
    """Return whose tiles fit a device: hopper's for 227 KiB of shared memory, else ampere's."""
    if device.type == "cpu":  # the interpreter
        return "ampere"
    return "hopper" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "ampere"


def blocks_for(kernel: Kernel, head_dim: int, generation: Generation) -> Blocks:
    """Return the sizes for a head dim up to 256: those of the next larger one in the table."""
    table = TABLE[generation][kernel]
    return next(sizes for largest, sizes in table.items() if head_dim <= largest)


def has_fused_backward(head_dim: int, generation: Generation) -> bool:
    """Return whether the table has sizes of the fused backward kernel for this head dim."""
    return head_dim <= max(TABLE[generation]["fused"])
