"""Work shared out to processes: results in the order of the work, and nothing left running when something fails."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from threading import Thread

from megatron_ring.errors import DataError


def in_order(work: Callable, jobs: Sequence, processes: int) -> Iterator:
    """``work`` of each job by so many processes, in the order of ``jobs``.

    Raises what the first job to fail raised, and DataError when a process was killed. Processes are spawned, since a
    forked copy of a program with threads may hang.
    """
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_follow_parent)
    try:
        yield from pool.map(work, jobs)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that tokenizes was killed, perhaps for want of memory. Set --workers lower and run the same "
            "command again: what is finished is kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leave interrupts to the parent, and end with it however it ends: a pool would wait for work forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    connection.wait([parent.sentinel])
    os._exit(1)
