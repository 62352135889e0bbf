"""A save that is killed, wherever it is, loses no checkpoint and leaves ``latest`` at a whole one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def killed(how: str, folder: Path) -> int:
    """How many saves ``killed_saves.py`` cut short."""
    command = [sys.executable, "-m", "tests.checkpoint.killed_saves", how, str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


def test_killed_at_random_moments(tmp_path):
    assert killed("at_random", tmp_path / "saved") == 50


def test_killed_before_every_action_on_a_file(tmp_path):
    assert killed("at_every_action", tmp_path) >= 50
