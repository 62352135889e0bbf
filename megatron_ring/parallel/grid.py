"""The grid: every process has a coordinate on each axis. Pure arithmetic; torch.distributed is not known here.

From slowest to fastest: pipe, data, context, tensor; inside context, ring outer and Ulysses inner, so that the busiest
neighbours sit closest together:

    global_rank = ((pipe * D + data) * C + context) * T + tensor,  C = R x U

DeepSpeed is shown one data axis of size D x C: ZeRO shards over it, and it needs no notion of context.
"""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from megatron_ring.config import ParallelConfig
from megatron_ring.errors import ConfigError
from megatron_ring.parallel import degrees


class Coordinates(NamedTuple):
    """A process's place on every axis, in rank order from slowest to fastest."""

    pipe: int
    data: int
    ring: int
    ulysses: int
    tensor: int


@dataclass(frozen=True)
class Grid:
    """The sizes of the axes."""

    pipe: int = 1
    data: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> Coordinates:
        return Coordinates(self.pipe, self.data, self.ring, self.ulysses, self.tensor)

    @property
    def context(self) -> int:
        """C, the processes that split one sequence."""
        return self.ring * self.ulysses

    @property
    def data_context(self) -> int:
        """D x C, the one data axis that DeepSpeed sees."""
        return self.data * self.context

    @property
    def world_size(self) -> int:
        return self.pipe * self.data_context * self.tensor

    def coordinates(self, global_rank: int) -> Coordinates:
        assert 0 <= global_rank < self.world_size
        found = []
        for size in reversed(self.sizes):
            global_rank, coordinate = divmod(global_rank, size)
            found.append(coordinate)
        return Coordinates(*reversed(found))

    def global_rank(self, at: Coordinates) -> int:
        rank = 0
        for size, coordinate in zip(self.sizes, at, strict=True):
            rank = rank * size + coordinate
        return rank

    def members(self, *axes: str) -> list[list[int]]:
        """The groups along ``axes``: in each, those coordinates vary and all others are fixed. Ranks in grid order."""
        free = [name in axes for name in Coordinates._fields]
        fixed = product(
            *(range(1 if is_free else size) for is_free, size in zip(free, self.sizes, strict=True))
        )
        inner = list(
            product(
                *(
                    range(size if is_free else 1)
                    for is_free, size in zip(free, self.sizes, strict=True)
                )
            )
        )
        return [
            [
                self.global_rank(Coordinates(*(a + b for a, b in zip(start, step, strict=True))))
                for step in inner
            ]
            for start in fixed
        ]

    @staticmethod
    def of(config: ParallelConfig, world_size: int) -> "Grid":
        """The grid that ``world_size`` processes make; raises ConfigError when the sizes do not multiply to it."""
        if problems := config.problems() or degrees.problems(config, world_size):
            raise ConfigError(problems)
        pipe, tensor = config.pipeline_model_parallel_size, config.tensor_model_parallel_size
        context = degrees.context_size(config, world_size)
        return Grid(
            pipe=pipe,
            data=world_size // (pipe * context * tensor),
            ring=context // config.ulysses_degree,
            ulysses=config.ulysses_degree,
            tensor=tensor,
        )
