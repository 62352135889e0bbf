"""Which code wrote a checkpoint, and when."""

import functools
import subprocess
from datetime import UTC, datetime
from pathlib import Path


def now() -> str:
    """This moment in UTC, to the second."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"


@functools.cache
def commit() -> str:
    """The commit of the checkout that this file is in, with "+" if it was changed since; "" outside of a checkout."""
    head = _git("rev-parse", "HEAD")
    return head + ("+" if head and _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    try:
        ended = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.strip() if ended.returncode == 0 else ""
