"""One rank's part in a hop: what it holds, what it computes, and what it exchanges with others.

No layout, device or library is named here. ring.py and direct.py are the loops over the hops.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from megatron_ring.context_parallel.hop_cost import exchanges_in_flight, queries_are_lighter
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask, hop_key_ranges
from megatron_ring.context_parallel.visible_rows import are_sent_directly
from megatron_ring.kernels.attention import GradientAccumulators, HopInputs, HopKernel
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.running_softmax import Output, slice_heads
from megatron_ring.parallel.peers import Peers, peers_at_distance


class Transfer(Protocol):
    """One exchange in flight: a tensor being sent, and another being received."""

    def wait(self) -> torch.Tensor:
        """Return the received tensor; from now on the sent tensor may be written to."""


class Exchange(Protocol):
    """Sends tensors around a ring, or between any of its ranks.

    All ranks must start the same exchanges in the same order.
    """

    def start(self, tensor: torch.Tensor, distance: int = 1) -> Transfer:
        """Send ``tensor`` on by ``distance`` ranks and receive its like, without blocking.

        A negative ``distance`` sends back.
        """

    def start_with(self, peers: Peers, tensor: torch.Tensor, received: torch.Tensor) -> Transfer:
        """Send ``tensor`` and receive into another, of any shape, without blocking.

        Both are dense. What has no elements is not sent: sender and receiver expect nothing.
        """


@dataclass(frozen=True)
class Ring:
    """One rank's position in a ring, and what it computes with.

    Attributes:
        exchange: None in a ring of one rank.
        on_hop: called with (hop, hops, source) as each hop begins, for monitoring; source is the
            ring rank whose keys, or queries, are processed in it.
        sends_queries: given q and kv, whether backward sends the queries rather than the keys.
        splits_own_work: whether backward keeps half of the work on the rank's own keys until the
            last message is in flight, at the price of more kernel calls (docs/decisions/0013).
        sends_all_rows: whether the mask makes no difference to what is sent, as in a published
            ring.
        exchanges_in_flight: given the number of hops, how many of them ahead an exchange starts
            where rows are sent directly.
    """

    layout: Layout
    ring_rank: int
    kernel: HopKernel
    scale: float
    exchange: Exchange | None
    mask: Mask = CAUSAL
    on_hop: Callable[[int, int, int], object] = lambda hop, hops, source: None
    sends_queries: Callable[[torch.Tensor, torch.Tensor], bool] = queries_are_lighter
    splits_own_work: bool = True
    sends_all_rows: bool = False
    exchanges_in_flight: Callable[[int], int] = exchanges_in_flight

    @functools.cached_property
    def sends_directly(self) -> bool:
        """Whether rows go straight to the ranks that read them, and only these (direct.py)."""
        if self.exchange is None or self.sends_all_rows:
            return False
        return are_sent_directly(self.layout, self.mask)

    @property
    def hops(self) -> int:
        """Number of hops: one for each rank of the ring."""
        return self.layout.ring_size if self.exchange else 1

    def hop_indices(self, source: Callable[[int], int]) -> Iterator[int]:
        """Yield the hops in order, from 0.

        ``source`` returns the ring rank whose keys, or queries, are processed in a hop.
        """
        for hop in range(self.hops):
            self.on_hop(hop, self.hops, source(hop))
            yield hop

    def keys_of(self, hop: int) -> int:
        """Return the ring rank that owns the keys of ``hop``, around the ring.

        Those of index 0 are its own, so that every query sees a key in its first hop.
        """
        return peers_at_distance(self.ring_rank, self.layout.ring_size, hop).sender

    def queries_of(self, hop: int) -> int:
        """Return the ring rank that owns the queries of ``hop``, if the queries travel around."""
        return peers_at_distance(self.ring_rank, self.layout.ring_size, hop).receiver

    def key_ranges(self, queries_of: int, keys_of: int) -> KeyRanges:
        """Return what the queries of one ring rank see of the keys of another."""
        return hop_key_ranges(self.layout, queries_of, keys_of, self.mask)

    @property
    def own_key_ranges(self) -> KeyRanges:
        """What this rank's queries see of its own keys."""
        return self.key_ranges(self.ring_rank, self.ring_rank)

    def send_kv_or_q(self, tensor: torch.Tensor, hop: int, distance: int) -> Transfer | None:
        """Send the tensor that the next hop needs; that of the last hop need not return."""
        return self.exchange.start(tensor, distance) if hop < self.hops - 1 else None

    def send_grad_accumulators(
        self, accumulators: torch.Tensor, hop: int, distance: int
    ) -> Transfer | None:
        """Send the gradients of the travelling tensor after it, after the last hop to its owner.

        After the last hop h they are h x ``distance`` ranks from their owner, and one message sends
        them straight back. Those of the first hop are not sent: the travelling tensor has not left
        its owner yet.
        """
        if hop == 0:
            return None
        is_last = hop == self.hops - 1
        return self.exchange.start(accumulators, -distance * hop if is_last else distance)


class QuerySide(NamedTuple):
    """A rank's queries and the tensors of their rows that their gradients need."""

    dout_BLHD: torch.Tensor
    q_BLHD: torch.Tensor
    out: Output
    lse_BHL: torch.Tensor


def split_groups(kv_2BLGD: torch.Tensor, ring: Ring) -> tuple[slice, slice, slice]:
    """Return all key-value heads, and those whose work on own keys is done first, and last.

    Half each, so that there is work both while the first message travels and while the last
    accumulators return; without ``splits_own_work`` all of them first.
    """
    groups = kv_2BLGD.shape[3]
    border = -(-groups // 2) if ring.splits_own_work and ring.hops > 1 else groups
    return slice(0, groups), slice(0, border), slice(border, groups)


def add_gradients(
    ring: Ring,
    key_ranges: KeyRanges,
    groups: slice,
    rows: QuerySide,
    kv_2BLGD: torch.Tensor,
    dq_BLHD: torch.Tensor,
    dkv_2BLGD: torch.Tensor,
) -> None:
    """Add to ``dq`` and ``dkv`` the share of these key-value heads and the queries reading them."""
    if groups.start == groups.stop:
        return
    heads_per_group = dq_BLHD.shape[2] // dkv_2BLGD.shape[3]
    heads = slice(groups.start * heads_per_group, groups.stop * heads_per_group)
    # Not sliced if all heads are wanted, so that the output of a KnownDelta is computed once.
    out = rows.out if heads == slice(0, dq_BLHD.shape[2]) else slice_heads(rows.out, heads)
    ring.kernel.backward(
        HopInputs(rows.q_BLHD[:, :, heads], *kv_2BLGD[:, :, :, groups], key_ranges, ring.scale),
        rows.dout_BLHD[:, :, heads],
        out,
        rows.lse_BHL[:, heads],
        GradientAccumulators(dq_BLHD[:, :, heads], *dkv_2BLGD[:, :, :, groups]),
    )
