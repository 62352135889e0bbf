"""Work shared out to processes: results in the order of the work, and nothing left running when something fails."""

import math
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from threading import Thread

from megatron_ring.errors import DataError


@contextmanager
def pool_of(processes: int) -> Iterator[Executor]:
    """So many processes to work for this one while it is in here. Raises DataError when one of them was killed.

    They are spawned, since a forked copy of a program with threads may hang.
    """
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_follow_parent
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise DataError(
            "a process that tokenizes was killed, perhaps for want of memory. Set --workers lower and run the same "
            "command again: what is finished is kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(
    pool: Executor, work: Callable, jobs: Iterable, ahead: float = math.inf
) -> Iterator[tuple]:
    """Each of ``jobs``, in their order, with what ``work`` of it by the processes of ``pool`` returned.

    So many jobs are taken ``ahead`` of the first that is not done. Raises what the first to fail raised.
    """
    under_way: deque[tuple] = deque()
    for job in jobs:
        under_way.append((job, pool.submit(work, job)))
        if len(under_way) > ahead:
            yield _done(*under_way.popleft())
    while under_way:
        yield _done(*under_way.popleft())


def _done(job: object, future: Future) -> tuple:
    return job, future.result()


def _follow_parent() -> None:
    """Leave interrupts to the parent, and end with it however it ends: a pool would wait for work forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    connection.wait([parent.sentinel])
    os._exit(1)
