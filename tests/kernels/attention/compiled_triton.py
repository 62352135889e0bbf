"""Compile Triton's kernels for GPUs that are not here, and print what each needs: one JSON object a line.

In a process of its own: under TRITON_INTERPRET nothing is compiled. Registers and stack are what CUDA's own tool says
of the machine code; stack that the source has none of is spilled registers.
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
from triton.compiler import ASTSource

from megatron_ring.kernels.attention.triton.backward_kernels import backward_hop_keys, backward_hop_queries
from megatron_ring.kernels.attention.triton.blocks import blocks_for
from megatron_ring.kernels.attention.triton.forward_kernel import forward_hop

KERNELS = {"forward": forward_hop, "queries": backward_hop_queries, "keys": backward_hop_keys}
CUOBJDUMP = next(Path(triton.__file__).parent.rglob("cuobjdump"))


def resources(kernel: str, head: int, architecture: int, dtype: str) -> dict[str, Any]:
    """Registers of a thread, bytes of its stack and bytes of shared memory of a program."""
    settings = blocks_for(kernel, head).settings(head)
    options = {name: settings.pop(name) for name in ("num_warps", "num_stages")}
    names = KERNELS[kernel].arg_names
    signature = {name: "constexpr" if name in settings else type_of(name, dtype) for name in names}
    # As at a launch: torch's memory begins at 16 bytes, and lengths of shards are mostly multiples of 16.
    multiples = [name for name in names if signature[name].startswith("*") or name in ("queries", "keys")]
    source = ASTSource(
        KERNELS[kernel],
        signature,
        {(names.index(name),): value for name, value in settings.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack = used(compiled.asm["cubin"])
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}


def type_of(name: str, dtype: str) -> str:
    if name in ("dout", "q", "k", "v"):
        return f"*{dtype}"
    if name in ("out", "lse", "delta", "dq", "dk", "dv"):
        return "*fp32"
    if name in ("lo", "hi", "seen_by"):
        return "*i32"
    return "fp32" if "scale" in name else "i32"


def used(machine_code: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    architectures = [int(number) for number in sys.argv[1:]]
    for architecture, kernel, head in itertools.product(architectures, KERNELS, (64, 96, 128, 256)):
        case = {"kernel": kernel, "head": head, "architecture": architecture}
        print(json.dumps(case | resources(kernel, head, architecture, "bf16")), flush=True)
