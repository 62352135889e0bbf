"""The ring loop: keys and values travel, each rank computes on those at hand, and results merge by log-sum-exp.

Ring Attention (Liu, Zaharia and Abbeel 2023, section 3, algorithm 1). One loop serves every layout: which keys a hop's
queries see comes from the mask, what computes it from the kernel, how tensors travel from the exchange. Backward, the
keys go around once more, or the queries do where those are fewer bytes. No layout, device or library is named here,
and nothing in a hop waits but for what the next hop needs.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask, hop_runs
from megatron_ring.context_parallel.traffic import queries_are_lighter
from megatron_ring.kernels.attention import HopKernel
from megatron_ring.kernels.attention.runs import KeyRanges
from megatron_ring.kernels.attention.state import (
    KnownDelta,
    Output,
    RunningSoftmax,
    delta,
    delta_of,
    heads_of,
    zero_sums,
)
from megatron_ring.parallel.messages import packed, unpacked


class Transfer(Protocol):
    """A tensor on its way around the ring, and its like on the way here."""

    def wait(self) -> torch.Tensor:
        """What was sent to this rank; the tensor that it sent may be reused from now on."""


class Exchange(Protocol):
    """How a rank passes a tensor on. Every rank of a ring starts the same exchanges in the same order."""

    def start(self, tensor: torch.Tensor, distance: int = 1) -> Transfer:
        """Send ``tensor`` ``distance`` ranks on (back, where negative), receive its like; returns at once."""


@dataclass(frozen=True)
class Ring:
    """One rank's place in a ring, and what it computes with."""

    layout: Layout
    ring_rank: int
    kernel: HopKernel
    scale: float
    exchange: Exchange | None  # None where the ring has one member: there is nobody to send to
    mask: Mask = CAUSAL
    on_hop: Callable[[int, int], object] = lambda hop, hops: (
        None
    )  # told of each, for those who watch
    # Given q and kv, whether backward sends the queries rather than the keys.
    sends_queries: Callable[[torch.Tensor, torch.Tensor], bool] = queries_are_lighter
    # Whether backward keeps half of the work on own keys for the last message, which costs calls (docs/decisions/0013).
    in_halves: bool = True

    @functools.cached_property
    def hops(self) -> int:
        """How often keys meet queries; fewer than ranks where nobody looks back that far. The same on every rank."""
        return self.layout.hops(self.mask.reach(self.layout.seq_length)) if self.exchange else 1

    def hop_indices(self) -> Iterator[int]:
        """The hops in turn, from 0."""
        for hop in range(self.hops):
            self.on_hop(hop, self.hops)
            yield hop

    def keys_of(self, hop: int) -> int:
        """The ring rank whose keys our queries meet in ``hop``: our own first, so that no row starts with nothing."""
        return (self.ring_rank - hop) % self.layout.ring_size

    def queries_of(self, hop: int) -> int:
        """The ring rank whose queries our keys meet in ``hop``, where the queries travel."""
        return (self.ring_rank + hop) % self.layout.ring_size

    def runs(self, queries_of: int, keys_of: int) -> KeyRanges:
        """What the queries of one ring rank see of the keys of another."""
        return hop_runs(self.layout, queries_of, keys_of, self.mask)

    @property
    def own_runs(self) -> KeyRanges:
        """What this rank's queries see of its own keys."""
        return self.runs(self.ring_rank, self.ring_rank)

    def send_kv_or_q(self, tensor: torch.Tensor, hop: int, distance: int) -> Transfer | None:
        """Send what is needed again in the next hop; the last hop's keys or queries need not come home."""
        return self.exchange.start(tensor, distance) if hop < self.hops - 1 else None

    def send_grad_accumulators(
        self, sums: torch.Tensor, hop: int, distance: int
    ) -> Transfer | None:
        """Send the gradients of what travels after it, and after the last hop home, wherever the ring was cut.

        Not those of the first hop, in which what travels has not left its rank.
        """
        if hop == 0:
            return None
        return self.exchange.start(
            sums, distance if hop < self.hops - 1 else -distance * (self.hops - 1)
        )


def forward(
    q_BLHD: torch.Tensor, kv_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of this rank's queries over the whole sequence: causal, and narrower where the mask is.

    ``kv_2BLGD`` holds K and V, dense, so that they travel as one message. Returns the output in q's type and
    the log-sum-exp (batch, heads, L) in float32 (float64 for float64). One exchange less than there are hops.
    """
    state = RunningSoftmax.empty(q_BLHD)
    for hop in ring.hop_indices():
        travelling = ring.send_kv_or_q(kv_2BLGD, hop, distance=1)
        runs = ring.runs(ring.ring_rank, ring.keys_of(hop))
        ring.kernel.forward(q_BLHD, kv_2BLGD[0], kv_2BLGD[1], runs, ring.scale, state)
        if travelling:
            kv_2BLGD = travelling.wait()
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
    """Gradients (dq, dkv) of ``forward``, in the accumulation type: float32, or float64 for float64.

    What is fewer bytes goes around: K and V, or Q with what belongs to it. Its gradients follow one hop behind, from
    the first rank that adds to them until they are home; those of the first hop stay there. Each rank adds its share
    when its own is computed. ``in_halves``, half of the work on its own keys is left until the sums go home, behind
    which there would be none.
    ``dlse`` is None where no gradient reaches the log-sum-exp.
    """
    dout_BLHD, out = with_gradient_of_lse(dlse_BHL, dout_BLHD, out_BLHD)
    travels = _queries_travel if ring.sends_queries(q_BLHD, kv_2BLGD) else _keys_travel
    return travels(QuerySide(dout_BLHD, q_BLHD, out, lse_BHL), kv_2BLGD, ring)


class QuerySide(NamedTuple):
    """A rank's queries, and what their gradients need."""

    dout_BLHD: torch.Tensor
    q_BLHD: torch.Tensor
    out: Output
    lse_BHL: torch.Tensor


def _keys_travel(
    own: QuerySide, own_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor]:
    every, early, late = _heads(own_2BLGD, ring)
    dq_BLHD, own_sums, kv_2BLGD, sums = zero_sums(own.q_BLHD), zero_sums(own_2BLGD), own_2BLGD, None
    for hop in ring.hop_indices():
        travelling = ring.send_kv_or_q(kv_2BLGD, hop, distance=1)
        dkv_2BLGD, runs = (
            zero_sums(kv_2BLGD) if hop else own_sums,
            ring.runs(ring.ring_rank, ring.keys_of(hop)),
        )
        _add_gradients(ring, runs, every if hop else early, own, kv_2BLGD, dq_BLHD, dkv_2BLGD)
        if sums:
            dkv_2BLGD = sums.wait().add_(dkv_2BLGD)
        sums = ring.send_grad_accumulators(dkv_2BLGD, hop, distance=1)
        if travelling:
            kv_2BLGD = travelling.wait()
    _add_gradients(ring, ring.own_runs, late, own, own_2BLGD, dq_BLHD, own_sums)
    return dq_BLHD, own_sums.add_(sums.wait()) if sums else own_sums


def _queries_travel(
    own: QuerySide, kv_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor]:
    every, early, late = _heads(kv_2BLGD, ring)
    dkv_2BLGD, own_sums, rows, sums = zero_sums(kv_2BLGD), zero_sums(own.q_BLHD), own, None
    load = (own.q_BLHD, own.dout_BLHD, own.lse_BHL, delta_of(own.out, own.dout_BLHD))
    message = packed(load) if ring.hops > 1 else None
    for hop in ring.hop_indices():
        travelling = ring.send_kv_or_q(message, hop, distance=-1)
        dq_BLHD, runs = (
            zero_sums(own.q_BLHD) if hop else own_sums,
            ring.runs(ring.queries_of(hop), ring.ring_rank),
        )
        _add_gradients(ring, runs, every if hop else early, rows, kv_2BLGD, dq_BLHD, dkv_2BLGD)
        if sums:
            dq_BLHD = sums.wait().add_(dq_BLHD)
        sums = ring.send_grad_accumulators(dq_BLHD, hop, distance=-1)
        if travelling:
            message = travelling.wait()
            q_BLHD, dout_BLHD, lse_BHL, delta_BHL = unpacked(message, load)
            rows = QuerySide(dout_BLHD, q_BLHD, KnownDelta(delta_BHL, dout_BLHD), lse_BHL)
    _add_gradients(ring, ring.own_runs, late, own, kv_2BLGD, own_sums, dkv_2BLGD)
    return own_sums.add_(sums.wait()) if sums else own_sums, dkv_2BLGD


def _heads(kv_2BLGD: torch.Tensor, ring: Ring) -> tuple[slice, slice, slice]:
    """Of the key-value heads all, and those for which a rank's queries meet its own keys first, and last.

    Half and half, so that there is work both while the first message travels and while the last sums go home; or all
    first.
    """
    groups = kv_2BLGD.shape[3]
    border = -(-groups // 2) if ring.in_halves and ring.hops > 1 else groups
    return slice(0, groups), slice(0, border), slice(border, groups)


def _add_gradients(
    ring: Ring,
    runs: KeyRanges,
    groups: slice,
    rows: QuerySide,
    kv_2BLGD: torch.Tensor,
    dq_BLHD: torch.Tensor,
    dkv_2BLGD,
) -> None:
    """Add to ``dq`` and ``dkv`` what comes of these key-value heads and the queries that read them."""
    if groups.start == groups.stop:
        return
    to_a_group = dq_BLHD.shape[2] // dkv_2BLGD.shape[3]
    heads = slice(groups.start * to_a_group, groups.stop * to_a_group)
    dout_BLhD, q_BLhD = (x[:, :, heads] for x in (rows.dout_BLHD, rows.q_BLHD))
    # A KnownDelta is not cut where all heads are wanted, so that its output is computed once.
    out = rows.out if heads == slice(0, dq_BLHD.shape[2]) else heads_of(rows.out, heads)
    (k_BLgD, v_BLgD), (dk_BLgD, dv_BLgD) = kv_2BLGD[:, :, :, groups], dkv_2BLGD[:, :, :, groups]
    ring.kernel.backward(
        dout_BLhD, q_BLhD, k_BLgD, v_BLgD, out, rows.lse_BHL[:, heads], runs, ring.scale,
        dq_BLHD[:, :, heads], dk_BLgD, dv_BLgD,
    )  # fmt: skip


def with_gradient_of_lse(
    dlse_BHL: torch.Tensor | None, dout_BLHD: torch.Tensor, out_BLHD: torch.Tensor
) -> tuple[torch.Tensor, Output]:
    """A ``dout`` and ``out`` from which a kernel that knows of no ``dlse`` finds the gradients of all three."""
    if dlse_BHL is None:
        return dout_BLHD, out_BLHD
    delta_BHL = delta(out_BLHD, dout_BLHD) - dlse_BHL
    dout_BLHD = _nudge_zero_dout(dout_BLHD, delta_BHL)
    return dout_BLHD, KnownDelta(delta_BHL, dout_BLHD)


def _nudge_zero_dout(dout_BLHD: torch.Tensor, delta_BHL: torch.Tensor) -> torch.Tensor:
    """dout, with two elements next to 0 in rows of zeros, and of what is as good as 0 beside delta.

    No output of a row whose lse alone is read has this delta, and where dout is tiny, an output
    that has it would overflow.
    """
    # As small as leaves its output, about the inverse, finite; float16 is short of room.
    epsilon = max(torch.finfo(delta_BHL.dtype).eps, 16 / torch.finfo(dout_BLHD.dtype).max)
    least_BLH1 = (delta_BHL * epsilon).transpose(1, 2).unsqueeze(-1)
    too_small_BLH1 = dout_BLHD.abs().amax(-1, keepdim=True) < least_BLH1.abs()
    filled_BLHD = dout_BLHD.clone(memory_format=torch.contiguous_format)
    two_BLH2 = filled_BLHD[..., :2]
    two_BLH2.copy_(torch.where(too_small_BLH1, least_BLH1.to(two_BLH2.dtype), two_BLH2))
    return filled_BLHD
