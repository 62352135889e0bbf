"""A ring whose results have the same bits for every ring size: it accumulates by fixed blocks.

A sample is split into eight blocks as the striped layout splits single tokens over a ring of
eight. In a smaller ring a rank owns the tokens of several blocks and separates them. Everything is
computed between two blocks, by the same call on the same numbers in rings of 1, 2, 4 and 8 ranks.

The queries of block i attend to the keys of block i - t for t = 0, 4, 2, 6, 1, 5, 3, 7, which is
counting with reversed bits. In one hop a rank can compute those t that have the same remainder
modulo R, and in this order they are adjacent for every such R. So the ring differs from ``ring.py``
only in how far keys travel after each hop: by as many ranks as the remainder changes. The gradients
of keys travel along and are added to in the same order, so nothing is stored until its turn.

The price: in backward, a rank adds to the accumulators that it receives, so it waits for them
before it computes; the keys travel even where the queries would be fewer bytes; a hop is several
smaller calls, on copies.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import hop_key_ranges
from megatron_ring.context_parallel.ring import Ring, fold_in_dlse
from megatron_ring.kernels.attention import GradientAccumulators, HopInputs
from megatron_ring.kernels.attention.determinism import deterministic_algorithms
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.running_softmax import (
    KnownDelta,
    Output,
    RunningSoftmax,
    output_of,
    zero_accumulators,
)

BLOCKS = 8
_ORDER = (0, 4, 2, 6, 1, 5, 3, 7)


class _Pair(NamedTuple):
    """One kernel call: indices of a local query block and a held key block, and the key ranges."""

    queries: int
    keys: int
    key_ranges: KeyRanges


class _Hop(NamedTuple):
    """The block pairs of one hop in order; after it the keys travel ``distance`` ranks.

    After the last hop ``distance`` leads to their owner.
    """

    pairs: list[_Pair]
    distance: int
    is_last: bool


def forward(
    q_BLHD: torch.Tensor, kv_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``ring.forward`` with the same bits for every ring size."""
    q_nBlHD = _blocks(q_BLHD, 1, ring)
    kv_n2BlGD = _blocks(kv_2BLGD, 2, ring)
    states = [RunningSoftmax.empty(q_BlHD) for q_BlHD in q_nBlHD]
    for hop in _hops(ring):
        in_flight = None if hop.is_last else ring.exchange.start(kv_n2BlGD, hop.distance)
        for queries, keys, key_ranges in hop.pairs:
            ring.kernel.forward(
                HopInputs(q_nBlHD[queries], *kv_n2BlGD[keys], key_ranges, ring.scale),
                states[queries],
            )
        if in_flight:
            kv_n2BlGD = in_flight.wait()
    out_BLHD = _joined([state.out_BLHD for state in states], 1)
    return out_BLHD.to(q_BLHD.dtype), _joined([state.lse_BHL for state in states], 2)


def backward(
    dout_BLHD: torch.Tensor,
    dlse_BHL: torch.Tensor | None,
    q_BLHD: torch.Tensor,
    kv_2BLGD: torch.Tensor,
    out_BLHD: torch.Tensor,
    lse_BHL: torch.Tensor,
    ring: Ring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``ring.backward`` with the same bits for every ring size."""
    dout_BLHD, out = fold_in_dlse(dlse_BHL, dout_BLHD, out_BLHD)
    q_nBlHD = _blocks(q_BLHD, 1, ring)
    dout_nBlHD = _blocks(dout_BLHD, 1, ring)
    out_blocks = _blocks_of_output(out, dout_nBlHD, ring)
    lse_nBHl = _blocks(lse_BHL, 2, ring)
    kv_n2BlGD = _blocks(kv_2BLGD, 2, ring)
    dq_nBlHD = zero_accumulators(q_nBlHD)
    dkv_n2BlGD = zero_accumulators(kv_n2BlGD)
    returning = None
    for hop in _hops(ring):
        in_flight = None if hop.is_last else ring.exchange.start(kv_n2BlGD, hop.distance)
        if returning:
            dkv_n2BlGD = returning.wait()
        for queries, keys, key_ranges in hop.pairs:
            with deterministic_algorithms():
                ring.kernel.backward(
                    HopInputs(q_nBlHD[queries], *kv_n2BlGD[keys], key_ranges, ring.scale),
                    dout_nBlHD[queries],
                    out_blocks[queries],
                    lse_nBHl[queries],
                    GradientAccumulators(dq_nBlHD[queries], *dkv_n2BlGD[keys]),
                )
        if ring.exchange:
            returning = ring.exchange.start(dkv_n2BlGD, hop.distance)
        if in_flight:
            kv_n2BlGD = in_flight.wait()
    if returning:
        dkv_n2BlGD = returning.wait()
    return _joined(dq_nBlHD, 1), _joined(dkv_n2BlGD, 2)


def _hops(ring: Ring) -> Iterator[_Hop]:
    blocks_per_rank = BLOCKS // ring.layout.ring_size

    def source(hop: int) -> int:
        return (ring.ring_rank - _ORDER[hop * blocks_per_rank]) % ring.layout.ring_size

    for hop in ring.hop_indices(source):
        start = hop * blocks_per_rank
        offsets = _ORDER[start : start + blocks_per_rank]
        next_offset = _ORDER[(start + blocks_per_rank) % BLOCKS]
        distance = (next_offset - offsets[0]) % ring.layout.ring_size
        yield _Hop(list(_pairs(ring, offsets)), distance, is_last=hop == ring.hops - 1)


def _pairs(ring: Ring, offsets: tuple[int, ...]) -> Iterator[_Pair]:
    ranks = ring.layout.ring_size
    block_layout = Layout("striped", ring.layout.seq_length, BLOCKS)
    for offset in offsets:
        for query_block in range(ring.ring_rank, BLOCKS, ranks):
            key_block = (query_block - offset) % BLOCKS
            key_ranges = hop_key_ranges(block_layout, query_block, key_block, ring.mask)
            yield _Pair(query_block // ranks, key_block // ranks, key_ranges)


def _blocks(x: torch.Tensor, tokens_dim: int, ring: Ring) -> torch.Tensor:
    """Return the n blocks of a rank's tokens in a new leading dimension, contiguous.

    Block k has every n-th token from the k-th on; in the sample it is block k x R + rank.
    """
    blocks_per_rank = BLOCKS // ring.layout.ring_size
    return x.unflatten(tokens_dim, (-1, blocks_per_rank)).movedim(tokens_dim + 1, 0).contiguous()


def _blocks_of_output(out: Output, dout_nBlHD: torch.Tensor, ring: Ring) -> Sequence[Output]:
    """Return the n blocks of an output, or a KnownDelta for each."""
    if isinstance(out, KnownDelta):
        return [KnownDelta(*block) for block in zip(_blocks(out.delta_BHL, 2, ring), dout_nBlHD)]
    return _blocks(output_of(out), 1, ring)


def _joined(blocks: list[torch.Tensor] | torch.Tensor, tokens_dim: int) -> torch.Tensor:
    """Invert ``_blocks``; the result is contiguous."""
    return torch.stack(tuple(blocks), tokens_dim + 1).flatten(tokens_dim, tokens_dim + 1)
