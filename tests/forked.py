"""A program in a process forked from one that has imported what it will: a moment of a processor instead of seconds.

It finds what ``python program`` would: its arguments, its folder, its environment, its output and its exit code. That a
program finds its imports by itself is for tests that start it with an interpreter or a launcher.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.distributed import IMPORTED


class Forked:
    """What is named as in subprocess.Popen does the same. It ends with the tests at the latest."""

    def __init__(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str], stderr: int
    ):
        """``command`` begins with a program in Python; ``stderr``: STDOUT or PIPE."""
        self._said = tempfile.TemporaryDirectory()
        self._out = Path(self._said.name, "out")
        self._err = self._out if stderr == subprocess.STDOUT else Path(self._said.name, "err")
        self._out.touch()
        self._err.touch()
        multiprocessing.set_forkserver_preload(IMPORTED)
        place = folder, dict(environment), (self._out, self._err)
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_run, args=(list(command), *place), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, str | None]:
        """What it said, once it has ended. Unlike Popen's, one that has not ended in time is killed."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout, self._out.read_text())
        return self._out.read_text(), None if self._err == self._out else self._err.read_text()


def _run(
    command: list[str], folder: Path, environment: dict[str, str], outputs: tuple[Path, Path]
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # an interpreter does that, and multiprocessing does not; wandb writes its file there
