"""Consensus between processes: every rank gets every rank's result, and an error of one ends all.

Only errors that the user can fix, MegatronRingError, are shared. Any other exception is raised
where it occurs; the launcher then ends the other ranks.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_ring.errors import MegatronRingError
from megatron_ring.parallel.process_id import ProcessId, describe_processes

Result = TypeVar("Result")


@dataclass(frozen=True)
class Consensus:
    """Collectives over all processes, in a group of their own.

    A thread may use it while another thread communicates in other groups.
    """

    group: dist.ProcessGroup

    @staticmethod
    def build() -> "Consensus":
        """Create the group, over gloo, because Python objects are exchanged. Collective; blocks.

        It has all ranks, as a gloo group beside NCCL must (rendezvous.py).
        """
        return Consensus(dist.new_group(backend="gloo"))

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self.group)

    def gather(self, act: Callable[[], Any]) -> list[Any]:
        """Call ``act`` on every rank and return all results, in rank order, on every rank; blocks.

        If ``act`` raises a MegatronRingError on any rank, the first one is raised on all. The rank
        that it is from raises its own error, with its cause and traceback; the others raise a copy.
        """
        outcome: Any
        try:
            outcome = act()
        except MegatronRingError as error:
            outcome = error
        outcomes = [None] * self.ranks
        dist.all_gather_object(outcomes, outcome, group=self.group)
        for rank, gathered in enumerate(outcomes):
            if isinstance(gathered, MegatronRingError):
                raise outcome if rank == self.rank else gathered
        return outcomes

    def run_on_rank_zero(self, act: Callable[[], Any]) -> Any:
        """Call ``act`` on rank 0 only and return its result, or raise its error, on every rank."""
        return self.gather(act if self.rank == 0 else lambda: None)[0]

    def any_rank(self, condition: bool) -> bool:
        """Return on every rank whether ``condition`` is true on any.

        One all-reduce of one number, cheap enough for every step; blocks.
        """
        anywhere = torch.tensor(int(condition))
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, self.group)
        return bool(anywhere)


def run_checked(consensus: Consensus, act: Callable[[], Result]) -> Result:
    """Call ``act`` and return its result on this rank; blocks until all ranks have called it.

    If ``act`` raises a MegatronRingError on any rank, the first one is raised on all, prefixed with
    the ranks that raised one, unless all did.
    """
    result, own_error = _attempt(act)
    _raise_first(consensus, own_error)
    return result


def run_checked_each_step(consensus: Consensus, act: Callable[[], Result]) -> Result:
    """Do what ``run_checked`` does at the cost of one all-reduce of a number if no rank fails."""
    result, own_error = _attempt(act)
    if consensus.any_rank(own_error is not None):
        _raise_first(consensus, own_error)
    return result


def _attempt(act: Callable[[], Result]) -> tuple[Result | None, MegatronRingError | None]:
    """Return the result of ``act``, or the MegatronRingError that it raises."""
    try:
        return act(), None
    except MegatronRingError as error:
        return None, error


def _raise_first(consensus: Consensus, own_error: MegatronRingError | None) -> None:
    """Raise the first rank's error on every rank, if any has one; all ranks must call it."""
    outcomes = consensus.gather(lambda: (ProcessId.here(consensus.rank), own_error))
    failed = [process for process, error in outcomes if error]
    if failed:
        first = next(error for _, error in outcomes if error)
        prefix = "" if len(failed) == len(outcomes) else f"on {describe_processes(failed)}: "
        raise type(first)(prefix + problem for problem in first.problems) from (own_error or first)


@contextlib.contextmanager
def abort_collectively() -> Iterator[None]:
    """Leave the process groups together if the body raises a MegatronRingError, as all ranks must.

    After that no rank waits for another, and one rank can report the error for all.
    """
    try:
        yield
    except MegatronRingError:
        dist.barrier()
        dist.destroy_process_group()
        raise
