"""A ring whose bits do not depend on its size: what it adds up, it adds block by block, in an order of the sample's.

A sample is dealt out to eight blocks as the striped layout deals single tokens to a ring of eight. Of a smaller ring a
rank has the tokens of several such blocks, takes them apart, and everything is computed between two blocks, by the same
call on the same numbers in rings of 1, 2, 4 and 8 ranks.

The queries of block i meet the keys of block i - t for t = 0, 4, 2, 6, 1, 5, 3, 7: counted with the bits reversed. What
a rank can compute in one hop are those t that have one remainder modulo R, and in this order they are neighbours for
every such R. So the ring only passes its keys on in another order than ``ring.py``: by as many ranks as the remainder
changes. The gradients of keys go along and meet the queries in the same order, so nothing is kept until its turn.

The price: backward, a rank adds to the sums that it was sent, and so waits for them before it computes; the keys travel
also where the queries would be fewer bytes; a hop is several smaller calls, on copies.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import hop_runs
from megatron_ring.context_parallel.ring import Ring, with_gradient_of_lse
from megatron_ring.kernels.attention.runs import KeyRanges
from megatron_ring.kernels.attention.state import KnownDelta, Output, RunningSoftmax, zero_sums

BLOCKS = 8
_ORDER = (0, 4, 2, 6, 1, 5, 3, 7)


class _Pair(NamedTuple):
    """Two blocks that meet: which of our queries, which of the keys at hand, and what the ones see of the others."""

    queries: int
    keys: int
    runs: KeyRanges


class _Hop(NamedTuple):
    """The pairs of one hop, in order, and by how many ranks the keys go on behind it: home after the last."""

    pairs: list[_Pair]
    distance: int
    last: bool


def forward(
    q_BLHD: torch.Tensor, kv_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``ring.forward``, and with the same bits for every size of the ring."""
    q_nBlHD, kv_n2BlGD = _blocks(q_BLHD, 1, ring), _blocks(kv_2BLGD, 2, ring)
    states = [RunningSoftmax.empty(q_BlHD) for q_BlHD in q_nBlHD]
    for hop in _hops(ring):
        travelling = None if hop.last else ring.exchange.start(kv_n2BlGD, hop.distance)
        for queries, keys, runs in hop.pairs:
            ring.kernel.forward(
                q_nBlHD[queries], *kv_n2BlGD[keys], runs, ring.scale, states[queries]
            )
        if travelling:
            kv_n2BlGD = travelling.wait()
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
    """As ``ring.backward``, and with the same bits for every size of the ring."""
    dout_BLHD, out = with_gradient_of_lse(dlse_BHL, dout_BLHD, out_BLHD)
    q, dout = (_blocks(x, 1, ring) for x in (q_BLHD, dout_BLHD))
    out = _blocks_of_output(out, dout, ring)
    lse, kv = _blocks(lse_BHL, 2, ring), _blocks(kv_2BLGD, 2, ring)
    dq, dkv, sums = zero_sums(q), zero_sums(kv), None
    for hop in _hops(ring):
        travelling = None if hop.last else ring.exchange.start(kv, hop.distance)
        dkv = sums.wait() if sums else dkv
        for queries, keys, runs in hop.pairs:
            ring.kernel.backward(
                dout[queries], q[queries], *kv[keys], out[queries], lse[queries], runs, ring.scale,
                dq[queries], *dkv[keys],
            )  # fmt: skip
        sums = ring.exchange.start(dkv, hop.distance) if ring.exchange else None
        if travelling:
            kv = travelling.wait()
    return _joined(dq, 1), _joined(sums.wait() if sums else dkv, 2)


def _hops(ring: Ring) -> Iterator[_Hop]:
    to_a_rank = BLOCKS // ring.layout.ring_size
    for hop in ring.hop_indices():
        start = hop * to_a_rank
        offsets, following = _ORDER[start : start + to_a_rank], _ORDER[(start + to_a_rank) % BLOCKS]
        distance = (following - offsets[0]) % ring.layout.ring_size
        yield _Hop(list(_pairs(ring, offsets)), distance, last=hop == ring.hops - 1)


def _pairs(ring: Ring, offsets: tuple[int, ...]) -> Iterator[_Pair]:
    ranks, layout = ring.layout.ring_size, Layout("striped", ring.layout.seq_length, BLOCKS)
    for offset in offsets:
        for of_queries in range(ring.ring_rank, BLOCKS, ranks):
            of_keys = (of_queries - offset) % BLOCKS
            yield _Pair(
                of_queries // ranks,
                of_keys // ranks,
                hop_runs(layout, of_queries, of_keys, ring.mask),
            )


def _blocks(x: torch.Tensor, tokens_dim: int, ring: Ring) -> torch.Tensor:
    """The n blocks of a rank's tokens, in a new dim before all others, each contiguous.

    Block k has every n-th token from the k-th on: of the sample, those of block k x R + rank.
    """
    to_a_rank = BLOCKS // ring.layout.ring_size
    return x.unflatten(tokens_dim, (-1, to_a_rank)).movedim(tokens_dim + 1, 0).contiguous()


def _blocks_of_output(out: Output, dout_nBlHD: torch.Tensor, ring: Ring) -> Sequence[Output]:
    """The n blocks of an output, or what stands in for each."""
    if isinstance(out, KnownDelta):
        return [KnownDelta(*block) for block in zip(_blocks(out.delta_BHL, 2, ring), dout_nBlHD)]
    return _blocks(out, 1, ring)


def _joined(blocks: list[torch.Tensor] | torch.Tensor, tokens_dim: int) -> torch.Tensor:
    """What ``_blocks`` has taken apart, contiguous."""
    return torch.stack(tuple(blocks), tokens_dim + 1).flatten(tokens_dim, tokens_dim + 1)
