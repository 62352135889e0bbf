"""Settings of all tests: one thread, the same random examples each time, Triton without a GPU.

Triton decides when a kernel is defined whether it is interpreted, so the variable is set before
anything is imported. ``make test-gpu`` sets it to 0, so that kernels are compiled for the GPU.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from importlib.util import find_spec

import torch
from hypothesis import settings

if os.environ["TRITON_INTERPRET"] == "1" and find_spec("triton"):
    from tests import fast_interpreter

    fast_interpreter.install()

torch.set_num_threads(1)

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--steps-of-pairs",
        type=int,
        default=2,
        help="steps that test_matrix.py trains on rows of pairs",
    )
    parser.addoption("--kills", type=int, default=4, help="kills in test_crash_loop.py")


def pytest_collection_modifyitems(items):
    """Run files with long tests first, so that no worker is left with one at the end.

    The parity matrix, which takes longest, is the first of them.
    """
    long = {item.path for item in items if item.get_closest_marker("whole")}
    items.sort(key=lambda item: (item.path not in long, item.path.name != "test_matrix.py"))
