"""A program run in a process forked from one that has its imports: it starts in a moment.

It gets the arguments, folder and environment that ``python program`` or ``python -m module`` would
give it, and its output and exit code are captured. Tests of a program's own imports start it with
an interpreter or a launcher instead.
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
from subprocess import CompletedProcess

from tests.distributed import PRELOADED


class Forked:
    """A running program, with the interface of subprocess.Popen; it ends with the tests."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        stderr: int,
        starts_processes: bool = False,
    ):
        """Start ``command``, which begins with a Python file or the name of a module.

        ``stderr`` is STDOUT or PIPE. Unless ``starts_processes``, it cannot start any with
        multiprocessing.
        """
        self._outputs = tempfile.TemporaryDirectory()
        self._out = Path(self._outputs.name, "out")
        self._err = self._out if stderr == subprocess.STDOUT else Path(self._outputs.name, "err")
        self._out.touch()
        self._err.touch()
        multiprocessing.set_forkserver_preload(PRELOADED)
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_run,
            args=(list(command), folder, dict(environment), (self._out, self._err)),
            daemon=not starts_processes,
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """The pid of the program."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or None while the program runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code, or None while the program runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the program."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the program."""
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, str | None]:
        """Return stdout and stderr once the program has ended.

        Unlike Popen's, this kills a program that has not ended within ``timeout`` seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout, self._out.read_text())
        return self._out.read_text(), None if self._err == self._out else self._err.read_text()


def run(command: Sequence[str | Path], folder: Path, timeout: float = 200) -> CompletedProcess:
    """Run ``command`` to its end; it may start processes."""
    parts = [str(part) for part in command]
    process = Forked(parts, folder, os.environ, subprocess.PIPE, starts_processes=True)
    stdout, stderr = process.communicate(timeout)
    return CompletedProcess(parts, process.returncode, stdout, stderr)


def _run(
    command: list[str], folder: Path, environment: dict[str, str], outputs: tuple[Path, Path]
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = command
    try:
        if command[0].endswith(".py"):
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
        else:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        # multiprocessing does not run exit functions, unlike an interpreter; wandb writes its file
        # in one.
        atexit._run_exitfuncs()
