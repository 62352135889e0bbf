"""Start a benchmark as a user does: ``python -m benchmarks.NAME``, in any directory."""

import os
import subprocess
import sys
from pathlib import Path

from tests import forked

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


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
