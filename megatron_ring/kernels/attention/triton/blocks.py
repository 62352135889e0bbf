"""How many queries and keys a Triton program of each kernel takes at a time, by head size and generation of GPU."""

from typing import Any, Literal, NamedTuple

import torch
import triton

Kernel = Literal["forward", "queries", "keys"]
Generation = Literal["ampere", "hopper"]


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


# Compiled for sm_80 and sm_90 no innermost loop of these spills a register (docs/decisions/0015, with what else was
# asked of them). Which is the fastest has not been measured, for want of a GPU: benchmarks/tune_blocks.py does.
TABLE: dict[Generation, dict[Kernel, dict[int, Blocks]]] = {
    "ampere": {
        "forward": {
            64: Blocks(128, 64, 8, 3),
            128: Blocks(128, 64, 8, 3),
            256: Blocks(64, 32, 8, 2),
        },
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
        "queries": {
            64: Blocks(128, 64, 8, 2),
            128: Blocks(128, 64, 8, 2),
            256: Blocks(128, 32, 8, 2),
        },
        "keys": {64: Blocks(64, 128, 8, 2), 128: Blocks(32, 128, 8, 2), 256: Blocks(64, 32, 8, 1)},
    },
}


def generation_of(device: torch.device) -> Generation:
    """Whose tiles a device gets: hopper's where a program may have 227 KiB of shared memory, else ampere's."""
    if device.type == "cpu":  # the interpreter
        return "ampere"
    return "hopper" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "ampere"


def blocks_for(kernel: Kernel, head: int, generation: Generation) -> Blocks:
    """For heads of this size, at most 256; sizes between take the next one's."""
    return next(sizes for largest, sizes in TABLE[generation][kernel].items() if head <= largest)
