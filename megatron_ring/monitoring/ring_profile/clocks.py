"""How far every process's clock is from rank 0's, so that moments of several nodes lie on one line.

Rank 0 is asked for its time, which it told somewhere between question and answer (Cristian 1989). The quickest of many
answers bounds it best.
"""

import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ring.parallel.consensus import Consensus

_QUESTIONS = 16


class Offset(NamedTuple):
    """What to add to time.monotonic_ns() of a process to have rank 0's, and by how much that may be wrong."""

    nanoseconds: int
    error: int


def offset_to_rank_0(consensus: Consensus) -> Offset:
    """Of this process. Collective: rank 0 answers the others one after another."""
    if consensus.rank:
        return min((_ask(consensus) for _ in range(_QUESTIONS)), key=lambda offset: offset.error)
    for other in range(1, consensus.ranks):
        for _ in range(_QUESTIONS):
            _answer(other, consensus)
    return Offset(0, 0)


def _ask(consensus: Consensus) -> Offset:
    told = torch.zeros(1, dtype=torch.int64)
    asked = time.monotonic_ns()
    dist.send(told, group=consensus.group, group_dst=0)
    dist.recv(told, group=consensus.group, group_src=0)
    heard = time.monotonic_ns()
    return Offset(int(told) - (asked + heard) // 2, (heard - asked + 1) // 2)


def _answer(other: int, consensus: Consensus) -> None:
    question = torch.zeros(1, dtype=torch.int64)
    dist.recv(question, group=consensus.group, group_src=other)
    dist.send(torch.tensor([time.monotonic_ns()]), group=consensus.group, group_dst=other)
