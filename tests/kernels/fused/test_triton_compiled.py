"""The element-wise Triton kernels as machine code: wide accesses, no atomics, no stack."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("architecture", [80, pytest.param(90, marks=pytest.mark.whole)])
def test_kernels_access_memory_16_bytes_at_a_time(architecture, tmp_path):
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("compiled_fused.py"), str(architecture)],
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(compiled) == 7
    for kernel in compiled:
        assert kernel["wide_loads"] > 0, kernel
        assert kernel["wide_stores"] > 0, kernel
        assert not kernel["atomics"], kernel
        assert not kernel["stack"], kernel
