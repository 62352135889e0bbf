"""Compile Triton's kernels for GPUs that are not here, and print what each is made of: one JSON object a line.

    PYTHONPATH=. TRITON_INTERPRET=0 python tests/kernels/attention/compiled_triton.py 80 128 256

compiles for compute capability 8.0 and head sizes 128 and 256.

In a process of its own: under TRITON_INTERPRET nothing is compiled. What the machine code holds is read from what
CUDA's own tools, which come with Triton, say of it.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from megatron_ring.kernels.attention.triton.backward_kernels import (
    backward_hop_keys,
    backward_hop_queries,
)
from megatron_ring.kernels.attention.triton.blocks import blocks_for
from megatron_ring.kernels.attention.triton.forward_kernel import forward_hop

KERNELS = {"forward": forward_hop, "queries": backward_hop_queries, "keys": backward_hop_keys}
GENERATIONS = {80: "ampere", 90: "hopper"}
CUOBJDUMP = next(Path(triton.__file__).parent.rglob("cuobjdump"))


def compiled(kernel: str, head: int, architecture: int, dtype: str) -> CompiledKernel:
    """As it is launched on such a GPU."""
    settings = blocks_for(kernel, head, GENERATIONS[architecture]).settings(head)
    options = {name: settings.pop(name) for name in ("num_warps", "num_stages")}
    names = KERNELS[kernel].arg_names
    signature = {name: "constexpr" if name in settings else type_of(name, dtype) for name in names}
    # As at a launch: torch's memory begins at 16 bytes, and lengths of shards are mostly multiples of 16.
    multiples = [
        name for name in names if signature[name].startswith("*") or name in ("queries", "keys")
    ]
    source = ASTSource(
        KERNELS[kernel],
        signature,
        {(names.index(name),): value for name, value in settings.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def made_of(kernel: CompiledKernel) -> dict[str, Any]:
    """What a program needs and how it computes.

    shared: bytes. stages: blocks under way. spills: moves between registers and stack within innermost loops.
    warps_of_products: how many warps lie down and across the tile of each matrix product.
    """
    source, layouts = kernel.asm["ptx"], kernel.asm["ttgir"]
    return {
        "shared": kernel.metadata.shared,
        "stages": kernel.metadata.num_stages,
        "spills": spills(kernel.asm["cubin"]),
        "wgmma": source.count("wgmma.mma_async"),
        "mma": source.count("mma.sync"),
        "copies_of_16_bytes": len(re.findall(r"cp\.async\.cg\.shared\.global .*, 0x10", source)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", source)),
        "warps_of_products": [
            [int(down), int(across)]
            for down, across in re.findall(r"nvidia_mma<.*warpsPerCTA = \[(\d+), (\d+)\]", layouts)
        ],
    }


def type_of(name: str, dtype: str) -> str:
    if name in ("dout", "q", "k", "v"):
        return f"*{dtype}"
    if name in ("out", "lse", "log2_lse", "delta", "dq", "dk", "dv"):
        return "*fp32"
    if name in ("lo", "hi", "seen_from", "seen_to"):
        return "*i32"
    return "fp32" if "scale" in name else "i32"


def spills(machine_code: bytes) -> int:
    """Loads and stores of the stack within loops that hold no other loop."""
    instructions = disassembled(machine_code)
    jumps = [
        (int(found[1], 16), at)
        for at, text in instructions
        if (found := re.search(r"BRA.* 0x(\w+)", text))
    ]
    loops = [(start, stop) for start, stop in jumps if start < stop]
    innermost = [loop for loop in loops if not any(loop[0] <= x < y < loop[1] for x, y in loops)]
    assert innermost, "a kernel that walks has loops"
    of_stack = [at for at, text in instructions if "LDL" in text or "STL" in text]
    return sum(any(start <= at <= stop for start, stop in innermost) for at in of_stack)


def disassembled(machine_code: bytes) -> list[tuple[int, str]]:
    """Every instruction's address and text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        said = subprocess.run(
            [CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    return [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", said)]


if __name__ == "__main__":
    architecture, *heads = (int(number) for number in sys.argv[1:])
    for kernel, head in itertools.product(KERNELS, heads):
        sizes = blocks_for(kernel, head, GENERATIONS[architecture])
        case = {"kernel": kernel, "head": head, "architecture": architecture}
        case["rows"] = sizes.block_k if kernel == "keys" else sizes.block_q
        print(json.dumps(case | made_of(compiled(kernel, head, architecture, "bf16"))), flush=True)
