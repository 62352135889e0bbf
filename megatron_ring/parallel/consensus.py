"""What processes do as one: each learns what every other got, and a fault of one is a fault of all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_ring.errors import MegatronRingError


@dataclass(frozen=True)
class Consensus:
    """All processes, over a group of their own, so that a thread may talk here while another talks elsewhere."""

    group: dist.ProcessGroup

    @staticmethod
    def build() -> "Consensus":
        """All processes call it, in the same place. Over gloo, because what is said are Python's objects."""
        return Consensus(dist.new_group(backend="gloo"))

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def gather(self, act: Callable[[], Any]) -> list[Any]:
        """What each gets when it acts, in rank order, on every rank; the first user's fault is
        raised on all.

        The rank that the fault is from raises its own error, with its cause and traceback; the
        others raise a copy.
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
        """What rank 0 gets when it acts, on every rank; its fault too."""
        return self.gather(act if self.rank == 0 else lambda: None)[0]

    def any_rank(self, so: bool) -> bool:
        """Whether it is so on any rank, the same on all: one all-reduce of a number, cheap enough for every step."""
        anywhere = torch.tensor(int(so))
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, self.group)
        return bool(anywhere)
