"""Start a benchmark as a user does: ``python -m benchmarks.NAME``, in any directory."""

import os
import subprocess
import sys
from pathlib import Path

from tests import forked

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
# A machine that is lent for a benchmark may have little more than torch.
OPTIONAL_MODULES = ["deepspeed", "tyro", "yaml", "psutil", "sentencepiece", "matplotlib"]


def command(name: str, *flags: str | Path) -> list[str | Path]:
    """Return the command line of the benchmark ``name``."""
    return [sys.executable, "-m", f"benchmarks.{name}", *flags]


def run(
    name: str, *flags: str | Path, check: bool = False, timeout: float = 120
) -> subprocess.CompletedProcess:
    """Run the benchmark ``name`` to its end in a forked process and capture what it prints.

    Its ranks must not return objects of its own classes, which a forked process cannot unpickle.
    """
    done = forked.run([f"benchmarks.{name}", *flags], Path.cwd(), timeout)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def import_with_little_more_than_torch(name: str) -> None:
    """Assert that the benchmark ``name`` can be imported where the optional modules are missing."""
    block = f"import sys; sys.modules |= dict.fromkeys({OPTIONAL_MODULES})"
    done = subprocess.run(
        [sys.executable, "-c", f"{block}; import benchmarks.{name}"], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stderr
