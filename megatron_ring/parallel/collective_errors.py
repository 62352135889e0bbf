"""What one rank cannot do ends the run for all of them, in order and said once."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch.distributed as dist

from megatron_ring.errors import MegatronRingError
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.process_id import Process, in_words

Got = TypeVar("Got")


def run_checked(consensus: Consensus, act: Callable[[], Got]) -> Got:
    """What this rank gets when it acts. The user's fault of one is raised on all, and says whose it is. Blocks."""
    got, fault = None, None
    try:
        got = act()
    except MegatronRingError as error:
        fault = error
    found = consensus.gather(lambda: (Process.here(consensus.rank), fault))
    if first := next((fault for _, fault in found if fault), None):
        struck = [process for process, fault in found if fault]
        whose = "" if len(struck) == len(found) else f"on {in_words(struck)}: "
        raise type(first)(whose + problem for problem in first.problems) from (fault or first)
    return got


def run_checked_each_step(consensus: Consensus, act: Callable[[], Got]) -> Got:
    """``run_checked`` for what is done over and over: one all-reduce of a number, where nothing is wrong."""
    got, fault = None, None
    try:
        got = act()
    except MegatronRingError as error:
        fault = error
    if consensus.any_rank(fault is not None):
        run_checked(consensus, lambda: _raise(fault))
    return got


def _raise(fault: MegatronRingError | None) -> None:
    if fault:
        raise fault


@contextlib.contextmanager
def abort_collectively() -> Iterator[None]:
    """Every user's fault in here is one that all ranks know of: they leave their groups, so that one speaks for all."""
    try:
        yield
    except MegatronRingError:
        dist.barrier()
        dist.destroy_process_group()
        raise
