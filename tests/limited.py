"""Calls with limits of memory and CPU time, for tests of inputs that could exhaust either."""

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MEMORY = 1 << 30
"""Bytes of address space in addition to what the process has."""
SECONDS = 20
"""CPU time. Refusing an input takes far less; processing it would take minutes or never end."""


class Exceeded(Exception):
    """A limit ended the call, or it blocked until the timeout."""


def limited(call: Callable[[], Any], waits: float = 120) -> Any:
    """Return what ``call`` returns, or raise what it raises, from a forked process with limits.

    Raises Exceeded for a MemoryError, for more than SECONDS of CPU time, and after ``waits``
    seconds of wall-clock time, which stand for a call that blocks forever.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(call, sender), daemon=True)
    process.start()
    sender.close()
    try:
        returned, outcome = (
            receiver.recv() if receiver.poll(waits) else (False, Exceeded(f"after {waits} s"))
        )
    except EOFError:
        process.join()
        returned, outcome = False, Exceeded(f"exit code {process.exitcode}")
    process.kill()
    process.join()
    if returned:
        return outcome
    raise Exceeded("out of memory") if isinstance(outcome, MemoryError) else outcome


def _run(call: Callable[[], Any], sender: Connection) -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        sender.send((True, call()))
    except BaseException as error:
        sender.send((False, error))
