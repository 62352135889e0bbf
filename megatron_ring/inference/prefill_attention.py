"""Attention of a chunk of prompt tokens over a sharded cache.

A rank computes its own tokens of the chunk, as in training. Their keys and values go into its
cache, and then either the cached keys travel around the ring or the queries do, whichever is fewer
bytes (docs/decisions/0026).

A step is what the attention functions of all layers share during one forward pass of the model.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_ring.context_parallel.mask import compute_key_ranges
from megatron_ring.inference.cache import Cache
from megatron_ring.kernels.attention import KERNELS, HopInputs, to_kernel_layout
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.running_softmax import RunningSoftmax, accumulation_dtype
from megatron_ring.parallel.collectives import RingExchange, RingRank


@dataclass(frozen=True)
class Chunk:
    """The new tokens of each sample in one forward pass, in the order of positions.

    Attributes:
        starts: tokens of each sample that are in the cache already.
        tokens: int64 (tokens,) on the CPU of each sample; may be empty.
        positions: for each ring rank and sample, the positions of the chunk that the rank owns.
    """

    starts: list[int]
    tokens: list[torch.Tensor]
    positions: list[list[torch.Tensor]]

    @functools.cached_property
    def longest_shard(self) -> int:
        """Tokens of the rank that has most."""
        return max(sum(map(len, of_rank)) for of_rank in self.positions)

    def lengths(self, rank: int) -> list[int]:
        """Return how many tokens of each sample ``rank`` computes."""
        return [len(positions) for positions in self.positions[rank]]


class VisibleKeys:
    """The cached entries that the queries of a chunk may see in layers of one window, by rank.

    The chunk's own entries are included. All ranks have the same numbers without communication.

    still_seen: entries of each sample on this rank that the first token after the chunk sees.
    """

    def __init__(self, cache: Cache, chunk: Chunk, window: int):
        self.chunk = chunk
        self.window = window
        self._ownership = cache.ownership
        self._lengths = [
            [
                cache.ownership.count(sample, rank, self._first_seen(start)) if len(tokens) else 0
                for sample, (start, tokens) in enumerate(zip(chunk.starts, chunk.tokens))
            ]
            for rank in range(cache.shape.ring_size)
        ]
        self.still_seen = [
            cache.ownership.count(sample, cache.shape.ring_rank, self._first_seen(length))
            for sample, length in enumerate(cache.lengths)
        ]
        self._ranges: dict[tuple[int, int, int], KeyRanges] = {}

    @property
    def longest_shard(self) -> int:
        """Entries of the rank that has most."""
        return max(map(sum, self._lengths))

    def lengths(self, rank: int) -> list[int]:
        """Return how many entries of each sample ``rank`` has."""
        return self._lengths[rank]

    def ranges(self, sample: int, queries_of: int, keys_of: int) -> KeyRanges:
        """Return what the sample's queries of one rank see of its entries on another."""
        key = sample, queries_of, keys_of
        if key not in self._ranges:
            query_positions = self.chunk.positions[queries_of][sample]
            start = self._first_seen(self.chunk.starts[sample])
            key_positions = self._ownership.positions(sample, keys_of, start)
            first_visible = query_positions - self.window + 1 if self.window else None
            self._ranges[key] = compute_key_ranges(query_positions, key_positions, first_visible)
        return self._ranges[key]

    def _first_seen(self, position: int) -> int:
        """Return the first position that a query at ``position`` sees, or a negative number."""
        return position - self.window + 1 if self.window else 0


class PrefillStep:
    """Attention of one chunk; ``cache.ownership`` must have its positions already.

    Every call of ``attend`` communicates on the two communicators of the ring and blocks. A rank
    without a token in the chunk passes one of no sample, whose result is 0.
    """

    def __init__(self, chunk: Chunk, cache: Cache, ring: RingRank, kernel: str):
        self.chunk = chunk
        self.cache = cache
        self.ring = ring
        self.kernel = kernel
        self._visible: dict[int, VisibleKeys] = {}

    def attend(
        self, layer: int, q_1lHD: torch.Tensor, k_1lGD: torch.Tensor, v_1lGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values to the cache and return out_1lHD, in q's dtype, and lse_1Hl."""
        window = self.cache.shape.windows[layer]
        if window not in self._visible:
            self._visible[window] = VisibleKeys(self.cache, self.chunk, window)
        visible = self._visible[window]
        own_2GMD = self._extend_cache(layer, k_1lGD[0], v_1lGD[0], visible)
        q_1lHD = to_kernel_layout(self.kernel, q_1lHD)
        if self.ring.links is None:
            states = self._empty_states(self.ring.rank, q_1lHD)
            self._add_keys(self.ring.rank, self.ring.rank, visible, q_1lHD, own_2GMD, states)
        elif self.keys_are_lighter(q_1lHD, k_1lGD, visible):
            states = self._send_keys(visible, q_1lHD, own_2GMD)
        else:
            states = self._send_queries(visible, q_1lHD, own_2GMD)
        return self._joined(states, q_1lHD)

    def keys_are_lighter(
        self, q_1lHD: torch.Tensor, k_1lGD: torch.Tensor, visible: VisibleKeys
    ) -> bool:
        """Return whether the keys are at most as many bytes as the queries; the same on all ranks.

        With the queries travel their partial results: an output in float32 and its log-sum-exp.
        """
        _, _, heads, head_dim = q_1lHD.shape
        keys = visible.longest_shard * 2 * k_1lGD.shape[2] * head_dim * k_1lGD.itemsize
        result_size = accumulation_dtype(q_1lHD.dtype).itemsize
        row = head_dim * q_1lHD.itemsize + (head_dim + 1) * result_size
        return keys <= self.chunk.longest_shard * heads * row

    def _extend_cache(
        self, layer: int, k_lGD: torch.Tensor, v_lGD: torch.Tensor, visible: VisibleKeys
    ) -> list[torch.Tensor]:
        """Return (2, G, M, D) of each sample: what the chunk may see of this rank's entries."""
        lengths = self.chunk.lengths(self.ring.rank)
        own_2GMD = []
        for sample, rows in enumerate(_slices(lengths)):
            seen = visible.lengths(self.ring.rank)[sample] - lengths[sample]
            kv = self.cache.layers[layer][sample]
            if len(self.chunk.tokens[sample]):
                still_seen = visible.still_seen[sample]
                own_2GMD.append(kv.extend(k_lGD[rows], v_lGD[rows], seen, still_seen))
            else:
                own_2GMD.append(kv.last(0))
        return own_2GMD

    def _send_keys(
        self, visible: VisibleKeys, q_1lHD: torch.Tensor, own_2GMD: list[torch.Tensor]
    ) -> list[RunningSoftmax]:
        ring = self.ring
        exchange = RingExchange.over(ring.links)
        two, groups, _, head_dim = own_2GMD[0].shape
        message = q_1lHD.new_empty((two, groups, visible.longest_shard, head_dim))
        for part, x in zip(_split(message, visible.lengths(ring.rank)), own_2GMD):
            part.copy_(x)
        states = self._empty_states(ring.rank, q_1lHD)
        kv_2GMD = own_2GMD
        for hop in range(ring.size):
            in_flight = exchange.start(message) if hop < ring.size - 1 else None
            self._add_keys(
                ring.rank, (ring.rank - hop) % ring.size, visible, q_1lHD, kv_2GMD, states
            )
            if in_flight:
                message = in_flight.wait()
                kv_2GMD = _split(message, visible.lengths((ring.rank - hop - 1) % ring.size))
        return states

    def _send_queries(
        self, visible: VisibleKeys, q_1lHD: torch.Tensor, own_2GMD: list[torch.Tensor]
    ) -> list[RunningSoftmax]:
        """Queries travel to lower ranks; the results of a rank's queries follow one hop later.

        Those of the first hop stay on their rank: the queries have not left it yet.
        """
        ring = self.ring
        exchange = RingExchange.over(ring.links)
        _, _, heads, head_dim = q_1lHD.shape
        own_tokens = sum(self.chunk.lengths(ring.rank))
        message = q_1lHD.new_empty((1, self.chunk.longest_shard, heads, head_dim))
        message[:, :own_tokens] = q_1lHD[:, :own_tokens]
        own_states = self._empty_states(ring.rank, q_1lHD)
        returning = None
        for hop in range(ring.size):
            in_flight = exchange.start(message, -1) if hop < ring.size - 1 else None
            queries_of = (ring.rank + hop) % ring.size
            if hop == 0:
                self._add_keys(queries_of, ring.rank, visible, q_1lHD, own_2GMD, own_states)
            else:
                results = self._new_results(q_1lHD)
                states = self._states_in(results, queries_of, q_1lHD)
                for state in states:
                    state.out_BLHD.zero_()
                    state.lse_BHL.fill_(-torch.inf)
                self._add_keys(queries_of, ring.rank, visible, message, own_2GMD, states)
                if returning:
                    results = returning.wait()
                    _merge(self._states_in(results, queries_of, q_1lHD), states)
                is_last = hop == ring.size - 1
                returning = exchange.start(results, hop if is_last else -1)
            if in_flight:
                message = in_flight.wait()
        _merge(own_states, self._states_in(returning.wait(), ring.rank, q_1lHD))
        return own_states

    def _add_keys(
        self,
        queries_of: int,
        keys_of: int,
        visible: VisibleKeys,
        q_1lHD: torch.Tensor,
        kv_2GMD: Sequence[torch.Tensor],
        states: Sequence[RunningSoftmax],
    ) -> None:
        """Attend with the queries of one rank to the entries of another, sample by sample."""
        scale = q_1lHD.shape[-1] ** -0.5
        for sample, rows in enumerate(_slices(self.chunk.lengths(queries_of))):
            if rows.start == rows.stop or not kv_2GMD[sample].shape[2]:
                continue
            ranges = visible.ranges(sample, queries_of, keys_of)
            k_1MGD, v_1MGD = kv_2GMD[sample].transpose(1, 2).unsqueeze(1)
            inputs = HopInputs(q_1lHD[:, rows], k_1MGD, v_1MGD, ranges, scale)
            KERNELS[self.kernel].forward(inputs, states[sample])

    def _empty_states(self, rank: int, q_1lHD: torch.Tensor) -> list[RunningSoftmax]:
        """Return a state for the queries of each sample; kernels need contiguous ones."""
        rows = _slices(self.chunk.lengths(rank))
        return [RunningSoftmax.empty(q_1lHD[:, of_sample]) for of_sample in rows]

    def _new_results(self, q_1lHD: torch.Tensor) -> torch.Tensor:
        """Allocate a message for the states of any rank's queries."""
        _, _, heads, head_dim = q_1lHD.shape
        size = self.chunk.longest_shard * heads * (head_dim + 1)
        return q_1lHD.new_empty(size, dtype=accumulation_dtype(q_1lHD.dtype))

    def _states_in(
        self, results: torch.Tensor, rank: int, q_1lHD: torch.Tensor
    ) -> list[RunningSoftmax]:
        """Return views of a message: the states of the queries of ``rank``, sample by sample."""
        _, _, heads, head_dim = q_1lHD.shape
        states = []
        end = 0
        for tokens in self.chunk.lengths(rank):
            start, lse_start = end, end + tokens * heads * head_dim
            end = lse_start + tokens * heads
            out_1lHD = results[start:lse_start].view(1, tokens, heads, head_dim)
            states.append(RunningSoftmax(out_1lHD, results[lse_start:end].view(1, heads, tokens)))
        return states

    def _joined(
        self, states: Sequence[RunningSoftmax], q_1lHD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not sum(self.chunk.lengths(self.ring.rank)):
            no_result = RunningSoftmax.empty(q_1lHD)
            return no_result.out_BLHD.to(q_1lHD.dtype), no_result.lse_BHL
        out_1lHD = torch.cat([state.out_BLHD for state in states], dim=1)
        return out_1lHD.to(q_1lHD.dtype), torch.cat([state.lse_BHL for state in states], dim=2)


def _slices(lengths: Sequence[int]) -> Iterator[slice]:
    """Yield the rows of each sample where samples are laid end to end."""
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _split(message_2GMD: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Return views of the entries of each sample; the message may be longer than all of them."""
    return [message_2GMD[:, :, entries] for entries in _slices(lengths)]


def _merge(into: Sequence[RunningSoftmax], states: Sequence[RunningSoftmax]) -> None:
    for target, state in zip(into, states):
        target.merge(slice(None), state.out_BLHD, state.lse_BHL)
