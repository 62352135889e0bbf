"""Triton's kernels as machine code: the properties of a fast kernel that machine code shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ring.kernels.attention.triton.blocks import has_fused_backward

ROOT = Path(__file__).parents[3]
# Bytes of shared memory that one program may use, by compute capability: 163 KiB on A100, 227 KiB
# on H100 (CUDA C++ Programming Guide, technical specifications by compute capability).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
# GPUs of compute capabilities 8.6, 8.9 and 12.x have the tiles of 8.0 and less memory; the registry
# refuses head dims above 128 there.
SMALL_SHARED_MEMORY = 99 * 1024
GENERATIONS = {80: "ampere", 90: "hopper"}


# With a head dim of 256 there are too few registers for a warp to hold whole rows, except on Hopper
# forward and for dQ.
EXCHANGED = {(80, "forward", 256), (80, "queries", 256), (80, "keys", 256), (90, "keys", 256)}
# Moves to and from the stack in three loops of some 400 instructions each, with Triton 3.9 only.
ALLOWED_SPILLS = {(80, "keys", 128): 3}
# Rows of a product per warp, in mma.sync and, for four warps together, in wgmma.
ROWS_PER_WARP = 16


# Each takes half a minute to compile; CI compiles one.
CASES = [
    pytest.param(
        architecture,
        head_dim,
        marks=pytest.mark.whole
        if (architecture, head_dim) == (90, 128)
        else pytest.mark.exhaustive,
    )
    for architecture in SHARED_MEMORY
    for head_dim in (64, 96, 128, 256)
]


@pytest.mark.parametrize(("architecture", "head_dim"), CASES)
def test_machine_code_follows_the_rules(architecture, head_dim, tmp_path):
    script = ROOT / "tests" / "kernels" / "attention" / "compiled_triton.py"
    run = subprocess.run(
        [sys.executable, script, str(architecture), str(head_dim)],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert [case["kernel"] for case in compiled] == [
        "forward",
        *(["fused"] if has_fused_backward(head_dim, GENERATIONS[architecture]) else []),
        "queries",
        "keys",
    ]
    broken = {rule.__name__: [case for case in compiled if not rule(case)] for rule in RULES}
    assert broken == {rule.__name__: [] for rule in RULES}


def fits_shared_memory(case: dict) -> bool:
    return case["shared"] <= SHARED_MEMORY[case["architecture"]]


def fits_small_shared_memory_up_to_128(case: dict) -> bool:
    has_tiles_of_small_gpus = case["architecture"] == 80 and case["head_dim"] <= 128
    return not has_tiles_of_small_gpus or case["shared"] <= SMALL_SHARED_MEMORY


def does_not_spill_in_loops(case: dict) -> bool:
    return case["spills"] <= ALLOWED_SPILLS.get(key(case), 0)


def uses_the_matrix_instructions_of_its_gpu(case: dict) -> bool:
    """Hopper uses wgmma, by warp groups; Ampere, and warps with partial rows, use mma.sync."""
    hopper = case["architecture"] == 90 and key(case) not in EXCHANGED
    expected, other = ("wgmma", "mma") if hopper else ("mma", "wgmma")
    return case[expected] > 0 and case[other] == 0


def computes_no_product_twice(case: dict) -> bool:
    """With more rows in the warps than in the tile, warps would repeat each other's work."""
    return all(ROWS_PER_WARP * down <= case["rows"] for down, _ in case["warps_of_products"])


def keeps_weights_in_registers(case: dict) -> bool:
    """A warp with whole rows multiplies its own weights, without a detour through shared memory.

    The fused kernel's fifth product, for dQ, sums over keys and so over warps.
    """
    rows_split = [down == case["warps"] for down, _ in case["warps_of_products"]]
    return key(case) in EXCHANGED or (any if case["kernel"] == "fused" else all)(rows_split)


def prefetches_blocks(case: dict) -> bool:
    """The next blocks are copied to shared memory, 16 bytes at a time, during the current one."""
    return case["stages"] == 1 or case["copies_of_16_bytes"] > 0


def only_the_fused_kernel_uses_atomics(case: dict) -> bool:
    return (case["atomics"] > 0) == (case["kernel"] == "fused")


def adds_four_numbers_at_a_time_on_hopper(case: dict) -> bool:
    return case["architecture"] < 90 or case["atomics"] == case["atomics_of_4"]


def key(case: dict) -> tuple[int, str, int]:
    return case["architecture"], case["kernel"], case["head_dim"]


RULES = [
    fits_shared_memory,
    fits_small_shared_memory_up_to_128,
    does_not_spill_in_loops,
    uses_the_matrix_instructions_of_its_gpu,
    computes_no_product_twice,
    keeps_weights_in_registers,
    prefetches_blocks,
    only_the_fused_kernel_uses_atomics,
    adds_four_numbers_at_a_time_on_hopper,
]
