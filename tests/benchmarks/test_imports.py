"""Benchmarks for GPU machines can be imported where little more than torch is installed."""

import subprocess
import sys

import pytest

from tests.benchmarks.commands import ROOT

FOR_GPU_MACHINES = ["bench_gpu", "bench_profile", "trace_overlap", "tune_blocks"]
# A machine that is lent for a benchmark may lack these.
OPTIONAL_MODULES = ["deepspeed", "tyro", "yaml", "psutil", "sentencepiece", "matplotlib"]
# Each module is imported in a fork, as if it were the first one.
PROGRAM = f"""\
import os, sys, torch
sys.modules |= dict.fromkeys({OPTIONAL_MODULES})
for name in {FOR_GPU_MACHINES}:
    pid = os.fork()
    if not pid:
        __import__("benchmarks." + name)
        print("imported", name, flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("name", FOR_GPU_MACHINES)
def test_imports_neither_deepspeed_nor_other_optional_packages(name, done):
    assert f"imported {name}" in done.stdout.splitlines(), done.stderr
