"""The process grid: every process has a coordinate on each axis. Pure arithmetic, no communication.

From slowest to fastest: pipe, data, context, tensor; within context, ring outside and Ulysses
inside, so that ranks that communicate most are closest together:

    global_rank = ((pipe * D + data) * C + context) * T + tensor,  C = R x U

DeepSpeed gets one data axis of size D x C: ZeRO shards over it, and needs no notion of context.
"""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from megatron_ring.config import ParallelConfig
from megatron_ring.errors import ConfigError
from megatron_ring.parallel import degrees


class Coordinates(NamedTuple):
    """A process's position on every axis, in rank order from slowest to fastest."""

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
        """All sizes, in the order of the axes."""
        return Coordinates(self.pipe, self.data, self.ring, self.ulysses, self.tensor)

    @property
    def context(self) -> int:
        """C, the number of processes that split one sequence."""
        return self.ring * self.ulysses

    @property
    def data_context(self) -> int:
        """D x C, the size of DeepSpeed's data axis."""
        return self.data * self.context

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.pipe * self.data_context * self.tensor

    def coordinates(self, global_rank: int) -> Coordinates:
        """Return the position of a global rank."""
        assert 0 <= global_rank < self.world_size
        fastest_first = []
        for size in reversed(self.sizes):
            global_rank, coordinate = divmod(global_rank, size)
            fastest_first.append(coordinate)
        return Coordinates(*reversed(fastest_first))

    def global_rank(self, at: Coordinates) -> int:
        """Return the global rank at a position."""
        rank = 0
        for size, coordinate in zip(self.sizes, at, strict=True):
            rank = rank * size + coordinate
        return rank

    def members(self, *axes: str) -> list[list[int]]:
        """Return all groups along ``axes``, as global ranks in grid order.

        Within a group the coordinates on ``axes`` vary, and all others are fixed.
        """
        varies = [name in axes for name in Coordinates._fields]
        sizes_of_fixed = [1 if vary else size for vary, size in zip(varies, self.sizes)]
        sizes_of_varying = [size if vary else 1 for vary, size in zip(varies, self.sizes)]
        origins = product(*map(range, sizes_of_fixed))
        offsets = list(product(*map(range, sizes_of_varying)))
        return [[self._rank_at(origin, offset) for offset in offsets] for origin in origins]

    def _rank_at(self, origin: tuple[int, ...], offset: tuple[int, ...]) -> int:
        return self.global_rank(Coordinates(*map(sum, zip(origin, offset))))

    @staticmethod
    def of(config: ParallelConfig, world_size: int) -> "Grid":
        """Return the grid of ``world_size`` processes; raise ConfigError if sizes do not fit."""
        if problems := config.problems() or degrees.problems(config, world_size):
            raise ConfigError(problems)
        pipe = config.pipeline_model_parallel_size
        tensor = config.tensor_model_parallel_size
        context = degrees.context_size(config, world_size)
        return Grid(
            pipe=pipe,
            data=world_size // (pipe * context * tensor),
            ring=context // config.ulysses_degree,
            ulysses=config.ulysses_degree,
            tensor=tensor,
        )


def layers_of_stage(num_layers: int, stages: int, stage: int) -> range:
    """Return the layers of pipeline stage ``stage``, from 0: contiguous, as evenly as possible.

    The first ``num_layers % stages`` stages hold one layer more than the others, because the last
    stage also computes the head.
    """
    assert 0 <= stage < stages
    share, extra = divmod(num_layers, stages)
    start = stage * share + min(stage, extra)
    return range(start, start + share + (stage < extra))
