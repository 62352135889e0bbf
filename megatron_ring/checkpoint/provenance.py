"""Provenance of a checkpoint: which code wrote it, and when."""

import functools
import subprocess
from datetime import UTC, datetime
from pathlib import Path


def now() -> str:
    """Return the current time in UTC, to the second."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"


@functools.cache
def commit() -> str:
    """Return the git commit of the checkout that this file is in.

    "+" is appended if tracked files have been changed since; "" outside a checkout.
    """
    head = _git("rev-parse", "HEAD")
    if not head:
        return ""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if changed else head


def _git(*arguments: str) -> str:
    try:
        completed = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return completed.stdout.strip() if completed.returncode == 0 else ""
