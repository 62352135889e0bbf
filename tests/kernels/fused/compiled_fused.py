"""Compile the element-wise Triton kernels for absent GPUs; print their machine code as JSON lines.

    PYTHONPATH=. TRITON_INTERPRET=0 python tests/kernels/fused/compiled_fused.py 90

It needs a process of its own, because nothing is compiled under TRITON_INTERPRET.
"""

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_ring.kernels.fused.triton import norm_kernels, rope_kernel, swiglu_kernels
from megatron_ring.kernels.fused.triton.launch import warps_for

NORM = {"BLOCK": 2048}
ROPE = {"HEAD_DIM": 128, "HEADS": 16, "P": 64}
KERNELS = {
    "norm": (norm_kernels._forward_kernel, NORM | {"HAS_ADDED": False}, 2048),
    "residual norm": (norm_kernels._forward_kernel, NORM | {"HAS_ADDED": True}, 2048),
    "norm backward": (norm_kernels._backward_kernel, NORM | {"HAS_DTOTAL": True}, 2048),
    "swiglu": (swiglu_kernels._forward_kernel, {"BLOCK": swiglu_kernels.BLOCK}, 2048),
    "swiglu backward": (swiglu_kernels._backward_kernel, {"BLOCK": swiglu_kernels.BLOCK}, 2048),
    "rope": (rope_kernel._rope_kernel, ROPE | {"INVERSE": False}, 2048),
    "rope backward": (rope_kernel._rope_kernel, ROPE | {"INVERSE": True}, 2048),
}
NUMBERS = {
    "x_stride", "added_stride", "width", "rows", "dnormalized_stride", "dtotal_stride",
    "total_stride", "gate_stride", "up_stride", "dout_stride", "q_stride", "k_stride", "v_stride",
    "angles", "heads", "groups",
}  # fmt: skip
IN_FLOAT32 = {"rstd", "dweight", "cos", "sin"}


def argument_type(name: str) -> str:
    """Return the type of a kernel's argument in Triton's notation."""
    if name in NUMBERS:
        return "i32"
    if name == "epsilon":
        return "fp32"
    return "*fp32" if name in IN_FLOAT32 else "*bf16"


def compile_kernel(name: str, architecture: int) -> dict:
    """Compile a kernel as for a launch on such a GPU, and describe its code."""
    function, constants, elements = KERNELS[name]
    names = function.arg_names
    signature = {x: "constexpr" if x in constants else argument_type(x) for x in names}
    # As at a launch: torch's memory is aligned, and widths and strides are multiples of 16.
    aligned = [x for x in names if signature[x].startswith("*") or signature[x] == "i32"]
    source = ASTSource(
        function,
        signature,
        {(names.index(x),): value for x, value in constants.items()},
        {(names.index(x),): [["tt.divisibility", 16]] for x in aligned},
    )
    options = {"num_warps": warps_for(elements)}
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    code = kernel.asm["ptx"]
    return {
        "kernel": name,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", code)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", code)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", code)),
        "stack": ".local" in code,
    }


if __name__ == "__main__":
    for kernel in KERNELS:
        print(json.dumps(compile_kernel(kernel, int(sys.argv[1]))), flush=True)
