"""Placement: which ring rank owns which blocks of a sample, chosen from the sample's documents.

Short documents are assigned whole to one rank: no other rank reads their keys, and their queries
have work in one hop only. The blocks of longer ones are distributed over a group of neighbouring
ranks that is large enough, up to all; the order of hops (parallel/peers.py) makes such groups meet
at the same time. The work is as balanced as if everything were distributed over all ranks, but
fewer rows travel and queries are loaded in fewer hops. The result is a pure function of the
documents and of the sizes: all ranks compute the same without communication, in O(blocks x ranks).
The tiles that a block visits do not depend on it (sample_blocks.py). The algorithm, and what was
tried besides, is in docs/decisions/0027.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from megatron_ring.context_parallel.batch_cache import BatchCache
from megatron_ring.context_parallel.hop_cost import exchanges_in_flight
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.placement_cost import measured_costs
from megatron_ring.context_parallel.sample_blocks import (
    BLOCK,
    HopCosts,
    SampleBlocks,
    compute_time,
    critical_path,
)
from megatron_ring.parallel.peers import group_sizes


@dataclass(frozen=True)
class WholeLimits:
    """The largest document that is assigned whole, as shares of what a rank has on average.

    A document that is n times as large goes to n ranks or more.

    Attributes:
        tokens: of the blocks that a rank owns.
        work: of the time that a rank computes.
    """

    tokens: float
    work: float


CANDIDATES = (
    WholeLimits(0.25, 0.25),
    WholeLimits(0.5, 0.25),
    WholeLimits(0.5, 0.1),
    WholeLimits(0.5, 0.05),
)
"""Limits that ``place_documents`` chooses from. Higher ones load queries in fewer hops and send
fewer rows; lower ones are better balanced in every hop."""

MIN_GAIN = 0.02
"""Share of the estimated time that a placement must save over stripes of one block."""

_UNITS_PER_RANK = 8
"""Neighbouring short documents are assigned together, up to this part of a rank's blocks: their
borders are inside blocks, and a block on two documents' border belongs to one rank."""

_CORRECTIONS = 2
"""How often the ranks are balanced again, by the hops in which each block of queries has work: this
is known once owners are, and changes a little by balancing."""

_MAX_IMBALANCE = 0.001
"""Ranks are balanced if none has more than this share above the mean."""


@dataclass(frozen=True, eq=False)
class Placement:
    """An assignment of the blocks of a sample to ring ranks. owners: (blocks,) int64."""

    blocks: SampleBlocks
    owners: np.ndarray

    def positions(self, ring_rank: int) -> torch.Tensor:
        """Return the positions in the sample of a rank's tokens: (L,) int64, increasing."""
        mine = np.flatnonzero(self.owners == ring_rank)
        first, stop = self.blocks.bounds[mine], self.blocks.bounds[mine + 1]
        lengths = stop - first
        within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        return torch.from_numpy(np.repeat(first, lengths) + within)


def place_documents(
    document_starts: Sequence[int] | np.ndarray,
    seq_length: int,
    ring_size: int,
    window: int = 0,
    costs: HopCosts | None = None,
    block: int = BLOCK,
) -> Placement | None:
    """Return the placement with the shortest critical path; None where stripes are as good.

    Stripes are those of one block. None for a ring of one rank too.

    Args:
        document_starts: Where documents begin, increasing from 0.
        seq_length: Tokens of the sample, a multiple of ``ring_size``.
        window: As in ``Mask``; 0 for none.
        costs: What a hop costs; by default only its tiles do.
        block: Tokens of a block.
    """
    costs = costs or HopCosts()
    if ring_size == 1:
        return None
    blocks = SampleBlocks.of(np.asarray(document_starts), seq_length, ring_size, window, block)
    placements = [assign(blocks, limits, costs) for limits in CANDIDATES]
    times = [estimated_time(blocks, owners, costs) for owners in placements]
    best = int(np.argmin(times))
    at_most = (1 - MIN_GAIN) * estimated_time(blocks, blocks.stripes(), costs)
    return Placement(blocks, placements[best]) if times[best] <= at_most else None


def place_samples(
    document_starts: torch.Tensor, samples: int, layout: Layout
) -> tuple[Placement | None, ...]:
    """Return the placement of each sample of a batch; None for one in the layout's order.

    () if the layout places none.

    ``document_starts`` are those of the samples laid end to end, as in ``Mask``. What was computed
    is kept as long as that tensor: the loader's thread computes it, and the ring finds it.
    """
    rules = layout.placement
    if rules is None:
        return ()

    def place_all() -> tuple[Placement | None, ...]:
        starts = document_starts.numpy()
        offsets = layout.seq_length * np.arange(samples)
        parts = np.split(starts, np.searchsorted(starts, offsets[1:]))
        costs = measured_costs()
        return tuple(
            place_documents(
                part - offset,
                layout.seq_length,
                layout.ring_size,
                rules.window,
                costs,
                rules.block,
            )
            for part, offset in zip(parts, offsets, strict=True)
        )

    return _PLACEMENTS.get(document_starts, (layout, samples), place_all)


_PLACEMENTS = BatchCache()


def placed_positions(
    layout: Layout,
    placements: Sequence[Placement | None],
    ring_rank: int,
    ulysses_rank: int = 0,
    ulysses_size: int = 1,
) -> torch.Tensor:
    """Return the positions of a process's tokens in each sample: (samples, l) int64, increasing.

    Ranks are those of ``Layout.positions``; the default is the whole shard, (samples, L).
    """
    spread_L = layout.positions(ring_rank)
    rows = [
        spread_L if placement is None else placement.positions(ring_rank)
        for placement in placements
    ]
    return torch.stack(rows).chunk(ulysses_size, dim=1)[ulysses_rank]


def estimated_time(blocks: SampleBlocks, owners: np.ndarray, costs: HopCosts) -> float:
    """Return the critical path of a ring in which hops send directly what is read."""
    transfer_RR = None
    if costs.row:
        transfer_RR = costs.row * blocks.rows_sent_directly(owners)
    compute_RR = compute_time(*blocks.hop_work(owners), costs)
    in_flight = exchanges_in_flight(blocks.ring_size)
    return critical_path(compute_RR, transfer_RR, in_flight)


def assign(blocks: SampleBlocks, limits: WholeLimits, costs: HopCosts) -> np.ndarray:
    """Return the owners of all blocks, (blocks,): an equal number of each length for every rank.

    Documents within ``limits`` are assigned whole, except where no rank can take all of their
    blocks, and share the blocks at their borders. Others are distributed over the smallest group of
    neighbouring ranks of whose shares they are within ``limits``, or over all ranks.
    """
    documents = _documents(blocks)
    ranks = _ranks_of(documents, blocks, limits, costs)
    state = _Assignment(blocks, documents, ranks, costs)
    in_groups = (ranks > 1) & (ranks < blocks.ring_size)
    units = [
        _Unit(first, stop, 1) for first, stop in _units(documents, ranks > 1, state.whole_per_rank)
    ]
    units += [
        _Unit(first, stop, int(size))
        for (first, stop), size in zip(documents[in_groups].tolist(), ranks[in_groups])
    ]
    state.assign_units(units)
    state.distribute(documents[(ranks > 1) & (ranks == blocks.ring_size)])
    state.balance_distributed()
    state.assign_shorter_blocks()
    for _ in range(_CORRECTIONS if costs.query_tile else 0):
        state.correct_weight(blocks, costs)
        state.balance_distributed()
    return state.owners


def _documents(blocks: SampleBlocks) -> np.ndarray:
    """Return the whole blocks of each document, [first, stop), as rows: (documents, 2).

    A block belongs to the document of its first token, whose other blocks are read by its queries.
    """
    document = blocks.document[: blocks.whole_blocks]
    if not len(document):
        return np.zeros((0, 2), dtype=np.int64)
    borders = np.flatnonzero(np.diff(document)) + 1
    return np.stack([np.append(0, borders), np.append(borders, len(document))], 1)


def _ranks_of(
    documents: np.ndarray,
    blocks: SampleBlocks,
    limits: WholeLimits,
    costs: HopCosts,
) -> np.ndarray:
    """Return to how many ranks each document goes, (documents,): 1, a group's, or all."""
    whole_per_rank = blocks.whole_blocks // blocks.ring_size
    weight = costs.tile * blocks.tiles + costs.query_tile
    before = np.append(0, weight.cumsum())
    work = before[documents[:, 1]] - before[documents[:, 0]]
    size = documents[:, 1] - documents[:, 0]
    mean_work = weight.sum() / blocks.ring_size
    needed = np.maximum(size / (limits.tokens * whole_per_rank), work / (limits.work * mean_work))
    needed = needed.round(9)  # sums of floats: equal documents need equally many
    sizes = [1, *group_sizes(blocks.ring_size)]
    return np.array(sizes)[np.searchsorted(sizes, needed).clip(max=len(sizes) - 1)]


def _units(
    documents: np.ndarray, distributed: np.ndarray, whole_per_rank: int
) -> list[tuple[int, int]]:
    """Return runs of blocks of neighbouring documents to assign whole, as [first, stop)."""
    most = max(1, whole_per_rank // _UNITS_PER_RANK)
    units: list[tuple[int, int]] = []
    for (first, stop), is_distributed in zip(documents.tolist(), distributed.tolist()):
        if is_distributed:
            continue
        if units and units[-1][1] == first and stop - units[-1][0] <= most:
            units[-1] = units[-1][0], stop
        else:
            units.append((first, stop))
    return units


class _Unit(NamedTuple):
    """Blocks [first, stop) that go to so many neighbouring ranks."""

    first: int
    stop: int
    ranks: int


class _Assignment:
    """The owners of the blocks while they are being assigned.

    owners: -1 for blocks not assigned yet. load: the work that each rank has so far.
    weight: the work of each block. Until ``correct_weight``, how often its queries are loaded is an
        estimate: once if its document is assigned whole, else once for every rank that may own a
        key it reads.
    """

    def __init__(
        self, blocks: SampleBlocks, documents: np.ndarray, ranks: np.ndarray, costs: HopCosts
    ):
        self.ring_size = blocks.ring_size
        self.whole_blocks = blocks.whole_blocks
        self.whole_per_rank = blocks.whole_blocks // blocks.ring_size
        self.owners = np.full(len(blocks), -1)
        self.load = np.zeros(blocks.ring_size)
        size = documents[:, 1] - documents[:, 0]
        self.distributed_document = np.repeat(np.where(ranks > 1, np.arange(len(ranks)), -1), size)
        hops = np.minimum(blocks.tiles, blocks.ring_size)
        hops[: self.whole_blocks] = np.minimum(
            blocks.tiles[: self.whole_blocks], ranks.repeat(size)
        )
        self.weight = costs.tile * blocks.tiles + costs.query_tile * hops
        self._before = np.append(0, self.weight.cumsum())

    def correct_weight(self, blocks: SampleBlocks, costs: HopCosts) -> None:
        """Count the hops in which each block has work, now that all owners are known."""
        self.weight = costs.tile * blocks.tiles + costs.query_tile * blocks.hops(self.owners)
        self.load = np.bincount(self.owners, self.weight, self.ring_size)

    def _work(self, first: int, stop: int) -> float:
        return self._before[stop] - self._before[first]

    def assign_units(self, units: list["_Unit"]) -> None:
        """Assign units to one rank or one group each, the largest work a rank first.

        Units of one rank are exchanged at the end. The work that a rank has in the end is projected
        from the ``free`` blocks that it can still take. All ranks take equally many blocks of
        units, to within one, which leaves equally many for documents that go to all. Where no rank
        can take all of a unit, the one with the most free blocks takes a part.
        """
        blocks_left = sum(stop - first for first, stop, _ in units)
        work_left = sum(self._work(first, stop) for first, stop, _ in units)
        free = np.full(self.ring_size, blocks_left // self.ring_size)
        free[: blocks_left % self.ring_size] += 1
        waiting = sorted(units, key=lambda unit: self._work(unit.first, unit.stop) / unit.ranks)
        assigned = []
        while waiting:
            first, stop, group_size = waiting.pop()
            projected = self.load + free * (work_left / blocks_left)
            blocks_left -= stop - first
            work_left -= self._work(first, stop)
            if group_size > 1:
                self._distribute_in_group(first, stop, projected, free, group_size)
                continue
            fits = np.flatnonzero(free >= stop - first)
            if len(fits):
                rank = fits[projected[fits].argmin()]
            else:
                rank = np.lexsort((projected, -free))[0]
                waiting.append(_Unit(first + free[rank], stop, 1))
                blocks_left += stop - first - free[rank]
                work_left += self._work(first + free[rank], stop)
                stop = first + free[rank]
            self.owners[first:stop] = rank
            self.load[rank] += self._work(first, stop)
            free[rank] -= stop - first
            assigned.append((first, stop))
        self._exchange_units(assigned)

    def _exchange_units(self, assigned: list[tuple[int, int]]) -> None:
        """Exchange units of equal size between the most and the least loaded rank.

        Ends when they are balanced, or no exchange brings the two closer.
        """
        units = np.array(assigned, dtype=np.int64).reshape(-1, 2)
        size = units[:, 1] - units[:, 0]
        work = self._before[units[:, 1]] - self._before[units[:, 0]]
        owner = self.owners[units[:, 0]]
        for _ in range(4 * self.ring_size):
            most_loaded, least_loaded = int(self.load.argmax()), int(self.load.argmin())
            wanted = (self.load[most_loaded] - self.load[least_loaded]) / 2
            if wanted <= _MAX_IMBALANCE * self.load.mean():
                return
            give, take = np.flatnonzero(owner == most_loaded), np.flatnonzero(owner == least_loaded)
            moved = work[give][:, None] - work[take]
            helps = (size[give][:, None] == size[take]) & (moved > 0) & (moved < 2 * wanted)
            if not helps.any():
                return
            error = np.where(helps, np.abs(moved - wanted), np.inf)
            i, j = np.unravel_index(error.argmin(), error.shape)
            for unit, rank in ((give[i], least_loaded), (take[j], most_loaded)):
                owner[unit] = rank
                self.owners[slice(*units[unit])] = rank
            self.load[most_loaded] -= moved[i, j]
            self.load[least_loaded] += moved[i, j]

    def _distribute_in_group(
        self, first: int, stop: int, projected: np.ndarray, free: np.ndarray, group_size: int
    ) -> None:
        """Distribute a document over the group with the least projected work that can take it.

        Where none can, the one with the most free blocks takes a part, and the next the rest.
        """
        groups = np.arange(self.ring_size).reshape(-1, group_size)
        room = free[groups].sum(1)
        fits = room >= stop - first
        for group in np.lexsort((projected[groups].sum(1), np.where(fits, 0, -room), ~fits)):
            part = min(stop - first, int(room[group]))
            self._distribute_run(stop - part, stop, groups[group], free)
            stop -= part

    def distribute(self, documents: np.ndarray) -> None:
        """Distribute long documents over all ranks, the one with the most work first."""
        taken = np.bincount(self.owners[self.owners >= 0], minlength=self.ring_size)
        free = self.whole_per_rank - taken
        for first, stop in sorted(documents.tolist(), key=lambda run: -self._work(*run)):
            self._distribute_run(first, stop, np.arange(self.ring_size), free)

    def _distribute_run(self, first: int, stop: int, among: np.ndarray, free: np.ndarray) -> None:
        """Assign the blocks of a run to some ranks, the last block first, one to each in a round.

        The least loaded rank gets the first block of a round; in a round of fewer blocks than
        ranks, the rank with the most free blocks does. ``free`` is updated.
        """
        while stop > first:
            ranks = among[free[among] > 0]
            is_partial = stop - first < len(ranks)
            by = (self.load[ranks], -free[ranks]) if is_partial else (self.load[ranks],)
            ranks = ranks[np.lexsort(by)][: stop - first]
            last_blocks = np.arange(stop - 1, stop - 1 - len(ranks), -1)
            self.owners[last_blocks] = ranks
            self.load[ranks] += self.weight[last_blocks]
            free[ranks] -= 1
            stop -= len(ranks)

    def balance_distributed(self) -> None:
        """Exchange blocks of one distributed document between the most and least loaded ranks."""
        for _ in range(8 * self.ring_size):
            most_loaded = int(self.load.argmax())
            if self.load[most_loaded] <= (1 + _MAX_IMBALANCE) * self.load.mean():
                return
            pairs = (self._best_pair(most_loaded, rank) for rank in self._least_loaded(4))
            pair = next((pair for pair in pairs if pair), None)
            if pair is None:
                return
            given, taken = pair
            moved = self.weight[given] - self.weight[taken]
            idle = self.owners[taken]
            self.owners[given], self.owners[taken] = idle, most_loaded
            self.load[most_loaded] -= moved
            self.load[idle] += moved

    def _least_loaded(self, most: int) -> Iterator[int]:
        yield from np.argsort(self.load, kind="stable")[:most].tolist()

    def _best_pair(self, loaded: int, idle: int) -> tuple[int, int] | None:
        """Return two blocks of a distributed document whose exchange balances two ranks best."""
        wanted = (self.load[loaded] - self.load[idle]) / 2
        whole = self.owners[: self.whole_blocks]
        give = np.flatnonzero((whole == loaded) & (self.distributed_document >= 0))
        take = np.flatnonzero((whole == idle) & (self.distributed_document >= 0))
        if not len(give) or not len(take):
            return None
        # An offset makes one order of documents and, within each, of weights.
        offset = self.distributed_document * (2 * self.weight.max() + 1)
        take = take[np.argsort(offset[take] + self.weight[take], kind="stable")]
        target = offset[give] + np.maximum(self.weight[give] - wanted, 0)
        after = np.searchsorted(offset[take] + self.weight[take], target)
        best = None
        for index in (after - 1, after):
            partner = take[index.clip(0, len(take) - 1)]
            moved = self.weight[give] - self.weight[partner]
            helps = (self.distributed_document[partner] == self.distributed_document[give]) & (
                (moved > 0) & (moved < 2 * wanted)
            )
            error = np.where(helps, np.abs(moved - wanted), np.inf)
            i = int(error.argmin())
            if helps[i] and (best is None or error[i] < best[0]):
                best = error[i], int(give[i]), int(partner[i])
        return best[1:] if best else None

    def assign_shorter_blocks(self) -> None:
        """Assign one of the shorter blocks at the end to each rank, most work to least loaded."""
        shorter = np.arange(self.whole_blocks, len(self.owners))
        if len(shorter):
            by_work = shorter[np.argsort(-self.weight[shorter], kind="stable")]
            self.owners[by_work] = np.argsort(self.load, kind="stable")
