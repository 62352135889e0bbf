"""Triton's kernels as machine code: no register is spilled, and tiles fit the shared memory that a program may have."""

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


@pytest.mark.whole
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_every_head_size_stays_in_registers_and_shared_memory(architecture, tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "kernels" / "attention" / "compiled_triton.py", str(architecture)],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(compiled) == 3 * 4
    assert [case for case in compiled if case["stack"] > 0 or case["shared"] > SHARED_MEMORY[architecture]] == []
