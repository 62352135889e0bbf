"""A sample as blocks of 128 tokens: which blocks each reads, and what an assignment to ranks costs.

Ranks that own whole blocks aligned to the sample cut no tile of a kernel: the keys that a block of
queries sees are a contiguous run of blocks under any assignment, so the tiles that it visits do not
depend on the assignment. What depends on it is in which hop they are visited, in how many hops a
block of queries is loaded, and which rows of keys leave their owner. All of it is counted here from
``owners``, (blocks,), the ring rank of each block. Nothing is communicated or computed.
"""

import functools
from dataclasses import dataclass

import numpy as np

from megatron_ring.parallel.peers import receivers_RR, senders_RR

BLOCK = 128
"""Tokens of a block: the rows of a kernel's tile of queries."""


@dataclass(frozen=True)
class HopCosts:
    """What a rank pays in a hop, in seconds or in any other unit common to all four.

    Attributes:
        tile: a tile of 128 x 128 pairs that is visited.
        query_tile: a tile of queries that has work in the hop, for loading it and its state.
        launch: a hop in which the rank has any work.
        row: a row of keys and values that the rank sends.
    """

    tile: float = 1.0
    query_tile: float = 0.0
    launch: float = 0.0
    row: float = 0.0


@dataclass(frozen=True, eq=False)
class SampleBlocks:
    """The blocks of a sample of ``ring_size`` shards, and what a causal mask lets each read.

    Every rank owns the same number of whole blocks. Where block x ring size does not divide the
    length, the last ``ring_size`` blocks are shorter, and every rank owns one of them.

    Attributes:
        block: tokens of a whole block.
        bounds: first token of each block, and the length of the sample; (blocks + 1,).
        first_key_block: the first block that the queries of each block read, up to themselves.
        document: index of the document of each block's first token; (blocks,).
        run_block, run_rows, run_last_reader: the keys in runs of rows that the same blocks read:
            the block that holds a run, its rows, and the last block that reads it, (runs,). All
            blocks from the holder to the last reader read it.
    """

    ring_size: int
    block: int
    bounds: np.ndarray
    first_key_block: np.ndarray
    document: np.ndarray
    run_block: np.ndarray
    run_rows: np.ndarray
    run_last_reader: np.ndarray

    @staticmethod
    def of(
        document_starts: np.ndarray,
        seq_length: int,
        ring_size: int,
        window: int = 0,
        block: int = BLOCK,
    ) -> "SampleBlocks":
        """Return the blocks of a sample whose documents begin at ``document_starts``.

        These increase from 0. ``window`` as in ``Mask``; 0 for none.
        """
        starts = np.asarray(document_starts, dtype=np.int64)
        assert seq_length % ring_size == 0
        assert starts[0] == 0
        assert (np.diff(starts) > 0).all()
        assert starts[-1] < seq_length
        bounds = _bounds(seq_length, ring_size, block)
        first_token = bounds[:-1]
        document = np.searchsorted(starts, first_token, side="right") - 1
        first_key = starts[document]
        if window:
            first_key = np.maximum(first_key, first_token - window + 1)

        cuts = [first_token, starts]
        if window:  # The last reader of a row changes where the window's end enters another block.
            cuts.append(np.maximum(first_token - window + 1, 0))
        run_first = np.unique(np.concatenate(cuts))
        ends = np.append(starts[1:], seq_length)
        run_end = np.append(run_first[1:], seq_length)
        last_query = ends[np.searchsorted(starts, run_first, side="right") - 1] - 1
        if window:
            last_query = np.minimum(last_query, run_end - 1 + window - 1)
        return SampleBlocks(
            ring_size,
            block,
            bounds,
            _block_of(bounds, first_key),
            document,
            _block_of(bounds, run_first),
            run_end - run_first,
            _block_of(bounds, last_query),
        )

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def seq_length(self) -> int:
        """S, the length of the sample."""
        return int(self.bounds[-1])

    @property
    def per_rank(self) -> int:
        """The number of blocks that each rank owns, whole and shorter."""
        return len(self) // self.ring_size

    @property
    def whole_blocks(self) -> int:
        """The number of blocks that are not shortened: they come first."""
        return self.seq_length // self.ring_size // self.block * self.ring_size

    @functools.cached_property
    def tiles(self) -> np.ndarray:
        """The tiles that the queries of each block visit over all hops, (blocks,) int64."""
        return np.arange(len(self)) - self.first_key_block + 1

    def stripes(self) -> np.ndarray:
        """Return the owners under ``striped`` by one block: rounds in alternating direction."""
        rounds, turn = np.divmod(np.arange(len(self)), self.ring_size)
        return np.where(rounds % 2 == 1, self.ring_size - 1 - turn, turn)

    def contiguous(self) -> np.ndarray:
        """Return the owners under ``ring``; needs a length that 128 x ring size divides."""
        assert len(self) == self.whole_blocks
        return np.arange(len(self)) // self.per_rank

    def zigzag(self) -> np.ndarray:
        """Return the owners under ``zigzag``; needs chunks of whole blocks."""
        assert len(self) == self.whole_blocks
        assert self.per_rank % 2 == 0
        chunk = np.arange(len(self)) // (self.per_rank // 2)
        return np.minimum(chunk, 2 * self.ring_size - 1 - chunk)

    def hop_work(self, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tiles visited and the query tiles with work in each hop of each rank.

        Both (hops, ranks) int64: in a hop a rank has the keys of its sender (parallel/peers.py).
        """
        visited = self._visited(owners)
        by_queries = np.zeros((2, self.ring_size, self.ring_size), dtype=np.int64)
        for rank in range(self.ring_size):
            mine = visited[owners == rank]
            by_queries[:, rank] = mine.sum(0), (mine > 0).sum(0)
        return _by_hop(by_queries[0]), _by_hop(by_queries[1])

    def hops(self, owners: np.ndarray) -> np.ndarray:
        """Return in how many hops the queries of each block have work, (blocks,) int64."""
        return (self._visited(owners) > 0).sum(1)

    def rows_sent_directly(self, owners: np.ndarray) -> np.ndarray:
        """Return the rows of keys that leave each rank if a hop sends from owner to reader.

        (hops, ranks) int64: the rows of a rank that its receiver of the hop reads; none in hop 0.
        """
        reads, holder = self._readers(owners)
        by_holder = np.zeros((self.ring_size, self.ring_size), dtype=np.int64)
        rank = np.arange(self.ring_size)
        for owner in rank:
            held = holder == owner
            by_holder[owner] = self.run_rows[held] @ reads[held]
        sent = by_holder[rank, receivers_RR(self.ring_size)]
        sent[0] = 0
        return sent

    def rows_forwarded(self, owners: np.ndarray) -> np.ndarray:
        """Return the rows of keys that leave each rank if they travel from neighbour to neighbour.

        (hops, ranks) int64: a row travels as far as the last rank of its journey that reads it. In
        hop t, rank j sends what it holds of rank j - t + 1; nothing in hop 0.
        """
        reads, holder = self._readers(owners)
        ranks = np.arange(self.ring_size)
        distance = np.where(reads, (ranks - holder[:, None]) % self.ring_size, 0).max(1)
        sent = np.zeros((self.ring_size, self.ring_size), dtype=np.int64)
        for hop in range(1, self.ring_size):
            travels = distance >= hop
            at = (holder[travels] + hop - 1) % self.ring_size
            sent[hop] = np.bincount(at, self.run_rows[travels], self.ring_size)
        return sent

    def _visited(self, owners: np.ndarray) -> np.ndarray:
        """Return the tiles that each block visits of each rank's keys: (blocks, ranks)."""
        before = self._owned_before(owners)
        return before[1:] - before[self.first_key_block]

    def _owned_before(self, owners: np.ndarray) -> np.ndarray:
        """Return how many of the blocks before each belong to each rank: (blocks + 1, ranks)."""
        owned = np.zeros((len(self) + 1, self.ring_size), dtype=np.int32)
        owned[np.arange(len(self)) + 1, owners] = 1
        return owned.cumsum(0, dtype=np.int32)

    def _readers(self, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which ranks read each run, (runs, ranks) bool, and the rank that owns it."""
        before = self._owned_before(owners)
        return before[self.run_last_reader + 1] > before[self.run_block], owners[self.run_block]


def critical_path(
    compute_RR: np.ndarray, transfer_RR: np.ndarray | None = None, in_flight: int = 1
) -> float:
    """Return when the last rank of a ring with direct messages has finished.

    As a rank begins a hop, it begins the exchange of the hop that is ``in_flight`` hops ahead, then
    computes. Before the next hop it waits for that hop's exchange: for its sender and its receiver
    to have begun the same one. So it runs at most ``in_flight`` hops ahead of either. Exchanges of
    a rank happen one after another.

    Args:
        compute_RR: Time that each rank computes in each hop, (hops, ranks).
        transfer_RR: Time that each rank sends for each hop, alike; 0 for the first.
    """
    hops, ranks = compute_RR.shape
    begins_RR = np.zeros((hops, ranks))
    exchanged = np.zeros(ranks)  # when the rank's last exchange was over
    for hop in range(1, hops):
        ends = begins_RR[hop - 1] + compute_RR[hop - 1]
        ready = np.maximum(begins_RR[max(hop - in_flight, 0)], exchanged)
        sent = np.maximum(ready, ready[receivers_RR(ranks)[hop]])
        if transfer_RR is not None:
            sent = sent + transfer_RR[hop]
        exchanged = np.maximum(sent, sent[senders_RR(ranks)[hop]])
        begins_RR[hop] = np.maximum(ends, exchanged)
    return float((begins_RR[-1] + compute_RR[-1]).max())


def compute_time(tiles: np.ndarray, query_tiles: np.ndarray, costs: HopCosts) -> np.ndarray:
    """Return what the work of ``hop_work`` costs, without communication."""
    work = costs.tile * tiles + costs.query_tile * query_tiles
    return work + costs.launch * (query_tiles > 0)


def _bounds(seq_length: int, ring_size: int, block: int) -> np.ndarray:
    whole, rest = divmod(seq_length // ring_size, block)
    lengths = np.repeat([block, rest], [whole * ring_size, ring_size if rest else 0])
    return np.concatenate([[0], lengths.cumsum()])


def _block_of(bounds: np.ndarray, token: np.ndarray) -> np.ndarray:
    return np.searchsorted(bounds, token, side="right") - 1


def _by_hop(by_source: np.ndarray) -> np.ndarray:
    """Turn (query rank, key rank) into (hop, query rank)."""
    return by_source[np.arange(len(by_source)), senders_RR(len(by_source))]
