"""What a call does within limits of memory and processor time, for input that would take all there is."""

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MEMORY = 1 << 30
"""Bytes of address space beyond those that the process has."""
SECONDS = 20
"""Of a processor. What is refused takes far less; what is not would take minutes, or for ever."""


class Exceeded(Exception):
    """The call was ended by a limit, or waited for something that never came."""


def limited(call: Callable[[], Any], waits: float = 120) -> Any:
    """Return what ``call`` returns, or raise what it raises, from a forked process with limits.

    Raises Exceeded for a MemoryError, for more than SECONDS of processor time, and after ``waits``
    seconds of any kind, which stand for waiting without end.
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
