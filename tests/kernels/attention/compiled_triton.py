"""Compile Triton's kernels for absent GPUs and print properties of the machine code as JSON lines.

    PYTHONPATH=. TRITON_INTERPRET=0 python tests/kernels/attention/compiled_triton.py 80 128 256

compiles for compute capability 8.0 and head sizes 128 and 256.

It needs a process of its own, because nothing is compiled under TRITON_INTERPRET. The machine code
is disassembled with CUDA's own tools, which Triton includes.
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
from megatron_ring.kernels.attention.triton.blocks import blocks_for, has_fused_backward
from megatron_ring.kernels.attention.triton.forward_kernel import forward_hop

KERNELS = {
    "forward": forward_hop,
    "fused": backward_hop_keys,
    "queries": backward_hop_queries,
    "keys": backward_hop_keys,
}
GENERATIONS = {80: "ampere", 90: "hopper"}
CUOBJDUMP = next(Path(triton.__file__).parent.rglob("cuobjdump"))


def compiled(kernel: str, head_dim: int, architecture: int, dtype: str) -> CompiledKernel:
    """Compile a kernel as for a launch on such a GPU."""
    settings = blocks_for(kernel, head_dim, GENERATIONS[architecture]).settings(head_dim)
    options = {name: settings.pop(name) for name in ("num_warps", "num_stages")}
    names = KERNELS[kernel].arg_names
    if "ADDS_DQ" in names:
        settings["ADDS_DQ"] = kernel == "fused"
    signature = {
        name: "constexpr" if name in settings else argument_type(name, dtype) for name in names
    }
    # As at a launch: torch's memory is aligned to 16 bytes, and lengths of shards are mostly
    # multiples of 16.
    multiples_of_16 = [
        name for name in names if signature[name].startswith("*") or name in ("queries", "keys")
    ]
    source = ASTSource(
        KERNELS[kernel],
        signature,
        {(names.index(name),): value for name, value in settings.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in multiples_of_16},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def properties(kernel: CompiledKernel) -> dict[str, Any]:
    """List the resources of a program and its instructions.

    shared: bytes of shared memory. stages: blocks in flight.
    spills: moves between registers and stack within innermost loops.
    warps_of_products: the numbers of warps down and across the tile of each matrix product.
    """
    source, layouts = kernel.asm["ptx"], kernel.asm["ttgir"]
    warps = re.findall(r"nvidia_mma<.*warpsPerCTA = \[(\d+), (\d+)\]", layouts)
    return {
        "shared": kernel.metadata.shared,
        "stages": kernel.metadata.num_stages,
        "spills": spills(kernel.asm["cubin"]),
        "wgmma": source.count("wgmma.mma_async"),
        "mma": source.count("mma.sync"),
        "copies_of_16_bytes": len(re.findall(r"cp\.async\.cg\.shared\.global .*, 0x10", source)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", source)),
        "atomics_of_4": len(re.findall(r"\b(?:atom|red)\..*\.v4\.f32", source)),
        "warps_of_products": [[int(down), int(across)] for down, across in warps],
    }


def argument_type(name: str, dtype: str) -> str:
    """Return the type of a kernel's argument in Triton's notation."""
    if name in ("dout", "q", "k", "v"):
        return f"*{dtype}"
    if name in ("out", "lse", "log2_lse", "delta", "dq", "dk", "dv"):
        return "*fp32"
    if name in ("lo", "hi", "query_from", "query_to", "tiles"):
        return "*i32"
    return "fp32" if "scale" in name else "i32"


def spills(machine_code: bytes) -> int:
    """Count the loads and stores of the stack within loops that contain no other loop."""
    instructions = disassembled(machine_code)
    loops = []
    for address, text in instructions:
        jump = re.search(r"BRA.* 0x(\w+)", text)
        if jump and int(jump[1], 16) < address:
            loops.append((int(jump[1], 16), address))
    innermost = [loop for loop in loops if not any(loop[0] <= x < y < loop[1] for x, y in loops)]
    assert innermost, "these kernels have loops"
    stack_accesses = [at for at, text in instructions if "LDL" in text or "STL" in text]
    return sum(any(start <= at <= stop for start, stop in innermost) for at in stack_accesses)


def disassembled(machine_code: bytes) -> list[tuple[int, str]]:
    """Return the address and text of every instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        listing = subprocess.run(
            [CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)
    return [(int(address, 16), text) for address, text in instructions]


if __name__ == "__main__":
    architecture, *head_dims = (int(number) for number in sys.argv[1:])
    for kernel, head_dim in itertools.product(KERNELS, head_dims):
        if kernel == "fused" and not has_fused_backward(head_dim, GENERATIONS[architecture]):
            continue
        sizes = blocks_for(kernel, head_dim, GENERATIONS[architecture])
        case = {"kernel": kernel, "head_dim": head_dim, "architecture": architecture}
        case["rows"] = sizes.block_k if kernel in ("fused", "keys") else sizes.block_q
        case["warps"] = sizes.warps
        compiled_kernel = compiled(kernel, head_dim, architecture, "bf16")
        print(json.dumps(case | properties(compiled_kernel)), flush=True)
