"""The ring loop where masks leave rows unread: rows go straight from their owner to their readers.

Masks of separate documents do, and those of windows that are shorter than a shard or two.

In every hop a rank has one receiver and one sender (parallel/peers.py), and only rows that are
needed are sent:

    keys travel       keys to the receiver of the hop, their gradients back to the sender
    queries travel    queries to the sender, their gradients back to the receiver (backward only)

Hop 0 is local. Sender and receiver derive the rows of each hop from the mask; a message without
rows is not posted, and a rank may send in a hop in which it receives nothing, or the reverse.
Exchanges start ``Ring.exchanges_in_flight`` hops ahead. Gradients are added in the order of the
hops.

A row leaves its owner once for each rank that reads it. Around the ring it would be sent by every
rank up to its last reader, which is never less often; for one long document both are the same
(docs/decisions/0027).
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.context_parallel.ring_hop import (
    QuerySide,
    Ring,
    Transfer,
    add_gradients,
    split_groups,
)
from megatron_ring.context_parallel.visible_rows import (
    VisibleRows,
    queries_with_visible_keys,
    visible_keys,
)
from megatron_ring.kernels.attention import HopInputs
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.running_softmax import (
    KnownDelta,
    RunningSoftmax,
    delta_of,
    zero_accumulators,
)
from megatron_ring.parallel.message_buffers import RowBuffers, unpack_bytes
from megatron_ring.parallel.peers import Peers, peers_in_hop

# The dimension of tokens.
_KV_DIM = 2
_Q_DIM = 1
_LSE_DIM = 2

_RowsByHop = dict[int, VisibleRows]


def forward(
    q_BLHD: torch.Tensor, kv_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what ``ring.forward`` of ring.py does: out_BLHD in q's type, and lse_BHL in float32.

    Collective over the ring; blocks. Starts one exchange less than there are hops.
    """
    state = RunningSoftmax.empty(q_BLHD)
    keys = _TravellingKeys(kv_2BLGD, ring)
    for hop in ring.hop_indices(keys.source):
        keys.start_ahead(hop)
        if (key_ranges := keys.key_ranges(hop)) is not None:
            inputs = HopInputs(q_BLHD, *keys.held_2BnGD, key_ranges, ring.scale)
            ring.kernel.forward(inputs, state)
        keys.receive(hop + 1)
    return state.out_BLHD.to(q_BLHD.dtype), state.lse_BHL


def backward_sending_keys(
    own: QuerySide, own_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dq_BLHD and dkv_2BLGD in float32: keys are received, and their gradients sent back.

    Collective over the ring; blocks.
    """
    all_groups, first_groups, last_groups = split_groups(own_2BLGD, ring)
    dq_BLHD = zero_accumulators(own.q_BLHD)
    own_dkv_2BLGD = zero_accumulators(own_2BLGD)
    keys = _TravellingKeys(own_2BLGD, ring)
    gradients = _ReturningGradients(own_dkv_2BLGD, _KV_DIM, keys)
    for hop in ring.hop_indices(keys.source):
        keys.start_ahead(hop)
        groups = all_groups if hop else first_groups
        dkv_2BnGD = gradients.zeros(hop) if hop else own_dkv_2BLGD
        if (key_ranges := keys.key_ranges(hop)) is not None:
            add_gradients(ring, key_ranges, groups, own, keys.held_2BnGD, dq_BLHD, dkv_2BnGD)
        if hop:
            gradients.start(dkv_2BnGD, hop)
        keys.receive(hop + 1)
    # The rest of the own work, while the last gradients return.
    add_gradients(ring, ring.own_key_ranges, last_groups, own, own_2BLGD, dq_BLHD, own_dkv_2BLGD)
    gradients.add_all_received()
    return dq_BLHD, own_dkv_2BLGD


def backward_sending_queries(
    own: QuerySide, kv_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dq_BLHD and dkv_2BLGD in float32: queries are received, their gradients sent back.

    Collective over the ring; blocks.
    """
    all_groups, first_groups, last_groups = split_groups(kv_2BLGD, ring)
    dkv_2BLGD = zero_accumulators(kv_2BLGD)
    own_dq_BLHD = zero_accumulators(own.q_BLHD)
    queries = _TravellingQueries(own, ring)
    gradients = _ReturningGradients(own_dq_BLHD, _Q_DIM, queries)
    for hop in ring.hop_indices(queries.source):
        queries.start_ahead(hop)
        groups = all_groups if hop else first_groups
        dq_BnHD = gradients.zeros(hop) if hop else own_dq_BLHD
        if (key_ranges := queries.key_ranges(hop)) is not None:
            add_gradients(ring, key_ranges, groups, queries.held, kv_2BLGD, dq_BnHD, dkv_2BLGD)
        if hop:
            gradients.start(dq_BnHD, hop)
        queries.receive(hop + 1)
    # The rest of the own work, while the last gradients return.
    add_gradients(ring, ring.own_key_ranges, last_groups, own, kv_2BLGD, own_dq_BLHD, dkv_2BLGD)
    gradients.add_all_received()
    return own_dq_BLHD, dkv_2BLGD


class _Travelling:
    """Rows that travel: those of this rank that others need, and those of others that it needs.

    Attributes:
        own_rows, peer_rows: by hop, from 1, which rows of this rank another needs, and which rows
            of another this rank needs.
        most_in_flight: how many hops ahead an exchange starts.
        in_flight: exchanges that have started and are not received, oldest first: those of the
            hops after the one that is computed.
    """

    def __init__(self, ring: Ring, own_rows: _RowsByHop, peer_rows: _RowsByHop):
        self.ring = ring
        self.own_rows = own_rows
        self.peer_rows = peer_rows
        self.most_in_flight = ring.exchanges_in_flight(ring.hops)
        self.in_flight: deque[Transfer] = deque()

    def peers(self, hop: int) -> Peers:
        """Return the ring ranks that get this rank's rows in ``hop``, and whose rows it gets."""
        raise NotImplementedError

    def source(self, hop: int) -> int:
        """Return the ring rank whose rows are held in ``hop``."""
        return self.peers(hop).sender

    def start_ahead(self, hop: int) -> None:
        """As ``hop`` begins, start the exchanges of the next hops; nothing after the last."""
        last = min(hop + self.most_in_flight, self.ring.hops - 1)
        for ahead in range(hop + 1 + len(self.in_flight), last + 1):
            message = self._message(self.own_rows[ahead])
            into = self._incoming.next(self._size(len(self.peer_rows[ahead])))
            transfer = self.ring.exchange.start_with(self.peers(ahead), message, into)
            self.in_flight.append(transfer)

    def key_ranges(self, hop: int) -> KeyRanges | None:
        """Return which keys are visible among the rows held in ``hop``; None if there are none."""
        if hop == 0:
            return self.ring.own_key_ranges
        return self.peer_rows[hop].key_ranges if len(self.peer_rows[hop]) else None

    def _allocate(self, like: torch.Tensor, dim: int) -> None:
        """Prepare buffers for messages like ``like``, which have their ``_size`` in ``dim``."""
        own_size, peer_size = (
            self._size(_most_rows(rows)) for rows in (self.own_rows, self.peer_rows)
        )
        self._outgoing = RowBuffers(like, dim, own_size, count=self.most_in_flight)
        # One more has the rows that are in use.
        self._incoming = RowBuffers(like, dim, peer_size, count=self.most_in_flight + 1)

    def _size(self, rows: int) -> int:
        """Return the size of the message of so many rows."""
        return rows

    def _message(self, rows: VisibleRows) -> torch.Tensor:
        raise NotImplementedError


class _TravellingKeys(_Travelling):
    """Sends this rank's keys to their readers, and holds those that its queries see in a hop."""

    def __init__(self, own_2BLGD: torch.Tensor, ring: Ring):
        as_owner, as_reader = _rows_by_hop(visible_keys, ring)
        super().__init__(ring, own_rows=as_owner, peer_rows=as_reader)
        self.own_2BLGD = own_2BLGD
        self.held_2BnGD = own_2BLGD
        self._allocate(own_2BLGD, _KV_DIM)

    def peers(self, hop: int) -> Peers:
        return _peers(self.ring, hop)

    def receive(self, hop: int) -> None:
        """Wait for the keys of ``hop``, the next one; after the last hop do nothing."""
        if hop < self.ring.hops:
            self.held_2BnGD = self.in_flight.popleft().wait()

    def _message(self, rows: VisibleRows) -> torch.Tensor:
        if rows.is_whole:
            return self.own_2BLGD
        message = self._outgoing.next(len(rows))
        _select(self.own_2BLGD, _KV_DIM, rows, message)
        return message


class _Payload(NamedTuple):
    """A tensor of the rows of queries, and its dimension of tokens."""

    tensor: torch.Tensor
    dim: int

    def form(self, rows: int) -> torch.Tensor:
        """Return a tensor without memory, with so many rows and the same order of dimensions."""
        return torch.empty_like(self.tensor.narrow(self.dim, 0, rows), device="meta")


class _TravellingQueries(_Travelling):
    """Sends this rank's queries, with the tensors of their rows, to the keys that they see."""

    def __init__(self, own: QuerySide, ring: Ring):
        as_owner, as_reader = _rows_by_hop(queries_with_visible_keys, ring)
        super().__init__(ring, own_rows=as_reader, peer_rows=as_owner)
        self.held = own
        self._payload = [
            _Payload(own.q_BLHD, _Q_DIM),
            _Payload(own.dout_BLHD, _Q_DIM),
            _Payload(own.lse_BHL, _LSE_DIM),
            _Payload(delta_of(own.out, own.dout_BLHD), _LSE_DIM),
        ]
        self._allocate(torch.empty(1, dtype=torch.uint8, device=own.q_BLHD.device), 0)

    def peers(self, hop: int) -> Peers:
        return _peers(self.ring, hop).reversed

    def receive(self, hop: int) -> None:
        """Wait for the queries of ``hop``, the next one; after the last hop do nothing."""
        if hop < self.ring.hops:
            message = self.in_flight.popleft().wait()
            parts = unpack_bytes(message, self._forms(len(self.peer_rows[hop])))
            q_BnHD, dout_BnHD, lse_BHn, delta_BHn = parts
            self.held = QuerySide(dout_BnHD, q_BnHD, KnownDelta(delta_BHn, dout_BnHD), lse_BHn)

    def _message(self, rows: VisibleRows) -> torch.Tensor:
        message = self._outgoing.next(self._size(len(rows)))
        for part, payload in zip(unpack_bytes(message, self._forms(len(rows))), self._payload):
            _select(payload.tensor, payload.dim, rows, part)
        return message

    def _forms(self, rows: int) -> list[torch.Tensor]:
        return [payload.form(rows) for payload in self._payload]

    def _size(self, rows: int) -> int:
        return sum(form.nbytes for form in self._forms(rows))


class _ReturningGradients:
    """Sends gradients of received rows to their owner, and adds those of own rows that come back.

    They are added in the order of the hops.

    Args:
        own: the accumulators of this rank's rows, which are added to.
        dim: their dimension of tokens.
        rows: what travels; gradients take the opposite direction.
    """

    def __init__(self, own: torch.Tensor, dim: int, rows: _Travelling):
        self.own = own
        self.dim = dim
        self.peers = rows.peers
        self.own_rows = rows.own_rows
        self.peer_rows = rows.peer_rows
        self.exchange = rows.ring.exchange
        self.most_in_flight = rows.most_in_flight
        self.in_flight: deque[tuple[Transfer, VisibleRows]] = deque()
        # The hop that is computed adds to one more.
        count = self.most_in_flight + 1
        self._outgoing = RowBuffers(own, dim, _most_rows(rows.peer_rows), count)
        self._incoming = RowBuffers(own, dim, _most_rows(rows.own_rows), self.most_in_flight)

    def zeros(self, hop: int) -> torch.Tensor:
        """Return accumulators for the rows that are held in ``hop``."""
        return self._outgoing.next(len(self.peer_rows[hop])).zero_()

    def start(self, gradients: torch.Tensor, hop: int) -> None:
        """Send the ``gradients`` of the rows held in ``hop``.

        Before that, wait for the oldest that come back and add them, if as many as may be are in
        flight.
        """
        if len(self.in_flight) == self.most_in_flight:
            self._add_oldest()
        rows = self.own_rows[hop]
        into = self._incoming.next(len(rows))
        transfer = self.exchange.start_with(self.peers(hop).reversed, gradients, into)
        self.in_flight.append((transfer, rows))

    def add_all_received(self) -> None:
        """Wait for all gradients of own rows that are on their way, and add them."""
        while self.in_flight:
            self._add_oldest()

    def _add_oldest(self) -> None:
        transfer, rows = self.in_flight.popleft()
        received = transfer.wait()
        if rows.is_whole:
            self.own.add_(received)
        elif len(rows):
            # No row occurs twice, so this is deterministic on CUDA too.
            self.own.index_add_(self.dim, rows.on(self.own.device), received)


def _rows_by_hop(
    find: Callable[[Layout, int, int, Mask], VisibleRows], ring: Ring
) -> tuple[_RowsByHop, _RowsByHop]:
    """Return by hop, from 1, rows of (receiver's queries, own keys) and (own queries, sender's).

    ``find`` selects which side of such a pair of queries and keys the rows are of.
    """
    layout, rank, mask = ring.layout, ring.ring_rank, ring.mask
    peers = {hop: _peers(ring, hop) for hop in range(1, ring.hops)}
    as_owner = {hop: find(layout, peer.receiver, rank, mask) for hop, peer in peers.items()}
    as_reader = {hop: find(layout, rank, peer.sender, mask) for hop, peer in peers.items()}
    return as_owner, as_reader


def _peers(ring: Ring, hop: int) -> Peers:
    return peers_in_hop(ring.ring_rank, ring.layout.ring_size, hop)


def _most_rows(by_hop: _RowsByHop) -> int:
    return max(map(len, by_hop.values()))


def _select(x: torch.Tensor, dim: int, rows: VisibleRows, into: torch.Tensor) -> None:
    """Copy ``rows`` of ``x`` to ``into``."""
    if rows.is_whole:
        into.copy_(x)
    else:
        torch.index_select(x, dim, rows.on(x.device), out=into)
