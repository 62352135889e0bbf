"""The ring loop: keys and values travel, each rank attends to those it holds, results merge by lse.

Ring Attention (Liu, Zaharia and Abbeel 2023, section 3, algorithm 1). One loop serves every layout:
the mask determines which keys the queries of a hop see, the kernel computes, the exchange moves
tensors. In backward the keys go around once more, or the queries do if they are fewer bytes. No
layout, device or library is named here, and a hop waits only for what the next hop needs.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from megatron_ring.context_parallel.hop_cost import queries_are_lighter
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask, hop_key_ranges
from megatron_ring.kernels.attention import (
    GradientAccumulators,
    HopInputs,
    HopKernel,
    call_whole,
)
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.running_softmax import (
    FinalOutput,
    KnownDelta,
    Output,
    RunningSoftmax,
    delta,
    delta_of,
    slice_heads,
    zero_accumulators,
)
from megatron_ring.parallel.message_buffers import pack_bytes, unpack_bytes


class Transfer(Protocol):
    """One exchange in flight: a tensor being sent, and one of the same form being received."""

    def wait(self) -> torch.Tensor:
        """Return the received tensor; from now on the sent tensor may be written to."""


class Exchange(Protocol):
    """Sends tensors around the ring. All ranks must start the same exchanges in the same order."""

    def start(self, tensor: torch.Tensor, distance: int = 1) -> Transfer:
        """Send ``tensor`` on by ``distance`` ranks and receive its like, without blocking.

        A negative ``distance`` sends back.
        """


@dataclass(frozen=True)
class Ring:
    """One rank's position in a ring, and what it computes with.

    Attributes:
        exchange: None in a ring of one rank.
        on_hop: called with (hop, hops) as each hop begins, for monitoring.
        sends_queries: given q and kv, whether backward sends the queries rather than the keys.
        splits_own_work: whether backward keeps half of the work on the rank's own keys until the
            last message is in flight, at the price of more kernel calls (docs/decisions/0013).
    """

    layout: Layout
    ring_rank: int
    kernel: HopKernel
    scale: float
    exchange: Exchange | None
    mask: Mask = CAUSAL
    on_hop: Callable[[int, int], object] = lambda hop, hops: None
    sends_queries: Callable[[torch.Tensor, torch.Tensor], bool] = queries_are_lighter
    splits_own_work: bool = True

    @functools.cached_property
    def hops(self) -> int:
        """Number of hops, equal on all ranks: fewer than ranks if no query looks back as far."""
        return self.layout.hops(self.mask.reach(self.layout.seq_length)) if self.exchange else 1

    def hop_indices(self) -> Iterator[int]:
        """Yield the hops in order, from 0."""
        for hop in range(self.hops):
            self.on_hop(hop, self.hops)
            yield hop

    def keys_of(self, hop: int) -> int:
        """Return the ring rank that owns the keys of ``hop``.

        Hop 0 has this rank's own, so that every query sees a key in its first hop.
        """
        return (self.ring_rank - hop) % self.layout.ring_size

    def queries_of(self, hop: int) -> int:
        """Return the ring rank that owns the queries of ``hop``, if the queries travel."""
        return (self.ring_rank + hop) % self.layout.ring_size

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

        They return to the owner from wherever the ring was cut. Those of the first hop are not
        sent: the travelling tensor has not left its owner yet.
        """
        if hop == 0:
            return None
        is_last = hop == self.hops - 1
        return self.exchange.start(accumulators, -distance * hop if is_last else distance)


def forward(
    q_BLHD: torch.Tensor, kv_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute exact attention of this rank's queries over the whole sequence, under ``ring.mask``.

    ``kv_2BLGD`` holds K and V, dense, so that they travel as one message. Returns the output in q's
    type and the log-sum-exp (batch, heads, L) in float32 (float64 for float64). Starts one exchange
    less than there are hops.
    """
    if ring.hops == 1 and (whole := _forward_whole(q_BLHD, kv_2BLGD, ring)):
        return whole
    state = RunningSoftmax.empty(q_BLHD)
    for hop in ring.hop_indices():
        in_flight = ring.send_kv_or_q(kv_2BLGD, hop, distance=1)
        key_ranges = ring.key_ranges(ring.ring_rank, ring.keys_of(hop))
        ring.kernel.forward(HopInputs(q_BLHD, *kv_2BLGD, key_ranges, ring.scale), state)
        if in_flight:
            kv_2BLGD = in_flight.wait()
    return state.out_BLHD.to(q_BLHD.dtype), state.lse_BHL


def backward(
    dout_BLHD: torch.Tensor,
    dlse_BHL: torch.Tensor | None,
    q_BLHD: torch.Tensor,
    kv_2BLGD: torch.Tensor,
    out_BLHD: torch.Tensor,
    lse_BHL: torch.Tensor,
    ring: Ring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients (dq, dkv) of ``forward`` in float32, or float64 for float64.

    A single hop that takes one call of the kernel's operator returns them as the operator does, in
    the dtype of q.

    Whichever is fewer bytes goes around: K and V, or Q with the tensors of its rows. Their gradient
    accumulators follow one hop later, from the first rank that adds to them until they are back at
    their owner; those of the first hop stay there. Each rank adds its share once it has computed
    its own. With ``splits_own_work``, half of the work on the rank's own keys is left until the
    accumulators return, when there would be nothing else to compute.

    ``dlse`` is None if no gradient reaches the log-sum-exp.
    """
    dout_BLHD, out = fold_in_dlse(dlse_BHL, dout_BLHD, out_BLHD)
    own = QuerySide(dout_BLHD, q_BLHD, out, lse_BHL)
    if ring.hops == 1 and (whole := _backward_whole(own, kv_2BLGD, ring)):
        return whole
    send = _send_queries if ring.sends_queries(q_BLHD, kv_2BLGD) else _send_keys
    return send(own, kv_2BLGD, ring)


class QuerySide(NamedTuple):
    """A rank's queries and the tensors of their rows that their gradients need."""

    dout_BLHD: torch.Tensor
    q_BLHD: torch.Tensor
    out: Output
    lse_BHL: torch.Tensor


def _forward_whole(
    q_BLHD: torch.Tensor, kv_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Compute the only hop with one call of the kernel's operator; None if it takes several."""
    inputs = HopInputs(q_BLHD, *kv_2BLGD, ring.own_key_ranges, ring.scale)
    if (results := call_whole(ring.kernel, "forward_whole", inputs)) is not None:
        ring.on_hop(0, 1)
    return results


def _backward_whole(
    own: QuerySide, kv_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Compute the gradients of the only hop alike, in the dtype of q."""
    inputs = HopInputs(own.q_BLHD, *kv_2BLGD, ring.own_key_ranges, ring.scale)
    after_inputs = own.dout_BLHD, own.out, own.lse_BHL
    results = call_whole(ring.kernel, "backward_whole", inputs, *after_inputs)
    if results is None:
        return None
    ring.on_hop(0, 1)
    dq_BLHD, dk_BLGD, dv_BLGD = results
    return dq_BLHD.contiguous(), torch.stack((dk_BLGD, dv_BLGD))


def _send_keys(
    own: QuerySide, own_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor]:
    all_groups, first_groups, last_groups = _split_groups(own_2BLGD, ring)
    dq_BLHD = zero_accumulators(own.q_BLHD)
    own_dkv_2BLGD = zero_accumulators(own_2BLGD)
    kv_2BLGD = own_2BLGD
    returning = None
    for hop in ring.hop_indices():
        in_flight = ring.send_kv_or_q(kv_2BLGD, hop, distance=1)
        dkv_2BLGD = zero_accumulators(kv_2BLGD) if hop else own_dkv_2BLGD
        key_ranges = ring.key_ranges(ring.ring_rank, ring.keys_of(hop))
        groups = all_groups if hop else first_groups
        _add_gradients(ring, key_ranges, groups, own, kv_2BLGD, dq_BLHD, dkv_2BLGD)
        if returning:
            dkv_2BLGD = returning.wait().add_(dkv_2BLGD)
        returning = ring.send_grad_accumulators(dkv_2BLGD, hop, distance=1)
        if in_flight:
            kv_2BLGD = in_flight.wait()
    _add_gradients(ring, ring.own_key_ranges, last_groups, own, own_2BLGD, dq_BLHD, own_dkv_2BLGD)
    return dq_BLHD, own_dkv_2BLGD.add_(returning.wait()) if returning else own_dkv_2BLGD


def _send_queries(
    own: QuerySide, kv_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor]:
    all_groups, first_groups, last_groups = _split_groups(kv_2BLGD, ring)
    dkv_2BLGD = zero_accumulators(kv_2BLGD)
    own_dq_BLHD = zero_accumulators(own.q_BLHD)
    rows = own
    returning = None
    payload = message = None
    if ring.hops > 1:
        payload = (own.q_BLHD, own.dout_BLHD, own.lse_BHL, delta_of(own.out, own.dout_BLHD))
        message = pack_bytes(payload)
    for hop in ring.hop_indices():
        in_flight = ring.send_kv_or_q(message, hop, distance=-1)
        dq_BLHD = zero_accumulators(own.q_BLHD) if hop else own_dq_BLHD
        key_ranges = ring.key_ranges(ring.queries_of(hop), ring.ring_rank)
        groups = all_groups if hop else first_groups
        _add_gradients(ring, key_ranges, groups, rows, kv_2BLGD, dq_BLHD, dkv_2BLGD)
        if returning:
            dq_BLHD = returning.wait().add_(dq_BLHD)
        returning = ring.send_grad_accumulators(dq_BLHD, hop, distance=-1)
        if in_flight:
            message = in_flight.wait()
            q_BLHD, dout_BLHD, lse_BHL, delta_BHL = unpack_bytes(message, payload)
            rows = QuerySide(dout_BLHD, q_BLHD, KnownDelta(delta_BHL, dout_BLHD), lse_BHL)
    _add_gradients(ring, ring.own_key_ranges, last_groups, own, kv_2BLGD, own_dq_BLHD, dkv_2BLGD)
    return own_dq_BLHD.add_(returning.wait()) if returning else own_dq_BLHD, dkv_2BLGD


def _split_groups(kv_2BLGD: torch.Tensor, ring: Ring) -> tuple[slice, slice, slice]:
    """Return all key-value heads, and those whose work on own keys is done first, and last.

    Half each, so that there is work both while the first message travels and while the last
    accumulators return; without ``splits_own_work`` all of them first.
    """
    groups = kv_2BLGD.shape[3]
    border = -(-groups // 2) if ring.splits_own_work and ring.hops > 1 else groups
    return slice(0, groups), slice(0, border), slice(border, groups)


def _add_gradients(
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


def fold_in_dlse(
    dlse_BHL: torch.Tensor | None, dout_BLHD: torch.Tensor, out_BLHD: torch.Tensor
) -> tuple[torch.Tensor, Output]:
    """Return a ``dout`` and ``out`` by which a kernel without ``dlse`` gets all three gradients."""
    if dlse_BHL is None:
        return dout_BLHD, FinalOutput.of(out_BLHD, dout_BLHD)
    delta_BHL = delta(out_BLHD, dout_BLHD) - dlse_BHL
    dout_BLHD = _nudge_zero_dout(dout_BLHD, delta_BHL)
    return dout_BLHD, KnownDelta(delta_BHL, dout_BLHD)


def _nudge_zero_dout(dout_BLHD: torch.Tensor, delta_BHL: torch.Tensor) -> torch.Tensor:
    """Return dout with two tiny elements in rows that are zero, or negligible compared with delta.

    Kernels that take an output instead of delta get one that has this delta. A row of zeros, as
    where only lse has a gradient, has no such output; where dout is tiny, it would overflow.
    """
    # As small as keeps that output, about the inverse, finite; float16 has little range.
    epsilon = max(torch.finfo(delta_BHL.dtype).eps, 16 / torch.finfo(dout_BLHD.dtype).max)
    least_BLH1 = (delta_BHL * epsilon).transpose(1, 2).unsqueeze(-1)
    too_small_BLH1 = dout_BLHD.abs().amax(-1, keepdim=True) < least_BLH1.abs()
    filled_BLHD = dout_BLHD.clone(memory_format=torch.contiguous_format)
    two_BLH2 = filled_BLHD[..., :2]
    two_BLH2.copy_(torch.where(too_small_BLH1, least_BLH1.to(two_BLH2.dtype), two_BLH2))
    return filled_BLHD
