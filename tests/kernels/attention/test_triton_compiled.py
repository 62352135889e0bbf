"""Triton's kernels as machine code: what must hold of it for a GPU to be fast, as far as reading it tells."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Bytes that one program may have, by compute capability: 163 KiB on A100, 227 KiB on H100 (CUDA C++ Programming Guide,
# technical specifications by compute capability).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


# Of a tile of 256 registers do not suffice for a warp to have whole rows, but on Hopper forward and for dQ.
EXCHANGED = {(80, "forward", 256), (80, "queries", 256), (80, "keys", 256), (90, "keys", 256)}
ROWS_OF_A_WARP = 16  # of a product, in mma.sync and, four warps together, in wgmma


# Each takes half a minute to compile.
HEAD_SIZES = [
    pytest.param(head, marks=pytest.mark.whole if head == 128 else pytest.mark.exhaustive)
    for head in (64, 96, 128, 256)
]


@pytest.mark.parametrize("head", HEAD_SIZES)
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_machine_code(architecture, head, tmp_path):
    run = subprocess.run(
        [
            sys.executable,
            ROOT / "tests" / "kernels" / "attention" / "compiled_triton.py",
            str(architecture),
            str(head),
        ],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(compiled) == 3
    broken = {rule.__name__: [case for case in compiled if not rule(case)] for rule in RULES}
    assert broken == {rule.__name__: [] for rule in RULES}


def fits_the_shared_memory(case: dict) -> bool:
    return case["shared"] <= SHARED_MEMORY[case["architecture"]]


def spills_nothing_in_a_loop(case: dict) -> bool:
    return case["spills"] == 0


def has_the_products_of_its_gpu(case: dict) -> bool:
    """wgmma, of whole warp groups, on Hopper; on Ampere, and where a warp has no rows of its own, mma.sync."""
    own = "wgmma" if case["architecture"] == 90 and named(case) not in EXCHANGED else "mma"
    return case[own] > 0 and case[{"mma": "wgmma", "wgmma": "mma"}[own]] == 0


def computes_no_product_twice(case: dict) -> bool:
    """Where warps have more rows than the tile, some compute what others do."""
    return all(ROWS_OF_A_WARP * down <= case["rows"] for down, _ in case["warps_of_products"])


def passes_weights_in_registers(case: dict) -> bool:
    """A warp whose rows are whole multiplies its own weights: none go through shared memory."""
    return named(case) in EXCHANGED or all(across == 1 for _, across in case["warps_of_products"])


def loads_blocks_ahead(case: dict) -> bool:
    """The next blocks come to shared memory, 16 bytes at a time, while this one is computed."""
    return case["stages"] == 1 or case["copies_of_16_bytes"] > 0


def adds_without_atomics(case: dict) -> bool:
    return case["atomics"] == 0


def named(case: dict) -> tuple[int, str, int]:
    return case["architecture"], case["kernel"], case["head"]


RULES = [
    fits_the_shared_memory,
    spills_nothing_in_a_loop,
    has_the_products_of_its_gpu,
    computes_no_product_twice,
    passes_weights_in_registers,
    loads_blocks_ahead,
    adds_without_atomics,
]
