"""A save killed at any point loses no checkpoint and leaves ``latest`` at a complete one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def kill_saves(mode: str, folder: Path) -> int:
    """Run ``killed_saves.py`` and return how many saves it has killed."""
    command = [sys.executable, "-m", "tests.checkpoint.killed_saves", mode, str(folder)]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert completed.returncode == 0, completed.stderr
    return int(completed.stdout)


def test_saves_killed_at_random_moments_lose_no_checkpoint(tmp_path):
    assert kill_saves("at_random", tmp_path / "saved") == 50


def test_saves_killed_before_every_action_on_a_file_lose_no_checkpoint(tmp_path):
    assert kill_saves("at_every_action", tmp_path) >= 50
