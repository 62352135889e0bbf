"""The ring loop: keys and values travel, each rank attends to those it holds, results merge by lse.

Ring Attention (Liu, Zaharia and Abbeel 2023, section 3, algorithm 1). The same loop serves every
layout: the mask determines which keys the queries of a hop see, the kernel computes, the exchange
moves tensors. In backward the keys go around once more, or the queries do if they are fewer bytes.
Masks that leave most rows unread have the loops of direct.py, which ``forward`` and ``backward``
call. No layout, device or library is named here, and a hop waits only for what the next hop needs.
"""

import torch

from megatron_ring.context_parallel import direct
from megatron_ring.context_parallel.ring_hop import (
    QuerySide,
    Ring,
    add_gradients,
    split_groups,
)
from megatron_ring.kernels.attention import HopInputs, call_whole
from megatron_ring.kernels.attention.running_softmax import (
    FinalOutput,
    KnownDelta,
    Output,
    RunningSoftmax,
    delta,
    delta_of,
    zero_accumulators,
)
from megatron_ring.parallel.message_buffers import pack_bytes, unpack_bytes


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
    if ring.sends_directly:
        return direct.forward(q_BLHD, kv_2BLGD, ring)
    state = RunningSoftmax.empty(q_BLHD)
    for hop in ring.hop_indices(ring.keys_of):
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

    Whichever is fewer bytes goes around, or to its readers (direct.py): K and V, or Q with the
    tensors of its rows. Around the ring their gradient accumulators follow one hop later, from the
    first rank that adds to them until they are back at their owner; those of the first hop stay
    there. Each rank adds its share once it has computed its own. With ``splits_own_work``, half of
    the work on the rank's own keys is left until the last accumulators return, when there would be
    nothing else to compute.

    ``dlse`` is None if no gradient reaches the log-sum-exp.
    """
    dout_BLHD, out = fold_in_dlse(dlse_BHL, dout_BLHD, out_BLHD)
    own = QuerySide(dout_BLHD, q_BLHD, out, lse_BHL)
    if ring.hops == 1 and (whole := _backward_whole(own, kv_2BLGD, ring)):
        return whole
    sends_queries = ring.sends_queries(q_BLHD, kv_2BLGD)
    if ring.sends_directly:
        send = direct.backward_sending_queries if sends_queries else direct.backward_sending_keys
    else:
        send = _send_queries if sends_queries else _send_keys
    return send(own, kv_2BLGD, ring)


def _forward_whole(
    q_BLHD: torch.Tensor, kv_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Compute the only hop with one call of the kernel's operator; None if it takes several."""
    inputs = HopInputs(q_BLHD, *kv_2BLGD, ring.own_key_ranges, ring.scale)
    if (results := call_whole(ring.kernel, "forward_whole", inputs)) is not None:
        ring.on_hop(0, 1, ring.ring_rank)
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
    ring.on_hop(0, 1, ring.ring_rank)
    dq_BLHD, dk_BLGD, dv_BLGD = results
    return dq_BLHD.contiguous(), torch.stack((dk_BLGD, dv_BLGD))


def _send_keys(
    own: QuerySide, own_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor]:
    all_groups, first_groups, last_groups = split_groups(own_2BLGD, ring)
    dq_BLHD = zero_accumulators(own.q_BLHD)
    own_dkv_2BLGD = zero_accumulators(own_2BLGD)
    kv_2BLGD = own_2BLGD
    returning = None
    for hop in ring.hop_indices(ring.keys_of):
        in_flight = ring.send_kv_or_q(kv_2BLGD, hop, distance=1)
        dkv_2BLGD = zero_accumulators(kv_2BLGD) if hop else own_dkv_2BLGD
        key_ranges = ring.key_ranges(ring.ring_rank, ring.keys_of(hop))
        groups = all_groups if hop else first_groups
        add_gradients(ring, key_ranges, groups, own, kv_2BLGD, dq_BLHD, dkv_2BLGD)
        if returning:
            dkv_2BLGD = returning.wait().add_(dkv_2BLGD)
        returning = ring.send_grad_accumulators(dkv_2BLGD, hop, distance=1)
        if in_flight:
            kv_2BLGD = in_flight.wait()
    add_gradients(ring, ring.own_key_ranges, last_groups, own, own_2BLGD, dq_BLHD, own_dkv_2BLGD)
    return dq_BLHD, own_dkv_2BLGD.add_(returning.wait()) if returning else own_dkv_2BLGD


def _send_queries(
    own: QuerySide, kv_2BLGD: torch.Tensor, ring: Ring
) -> tuple[torch.Tensor, torch.Tensor]:
    all_groups, first_groups, last_groups = split_groups(kv_2BLGD, ring)
    dkv_2BLGD = zero_accumulators(kv_2BLGD)
    own_dq_BLHD = zero_accumulators(own.q_BLHD)
    rows = own
    returning = None
    payload = message = None
    if ring.hops > 1:
        payload = (own.q_BLHD, own.dout_BLHD, own.lse_BHL, delta_of(own.out, own.dout_BLHD))
        message = pack_bytes(payload)
    for hop in ring.hop_indices(ring.queries_of):
        in_flight = ring.send_kv_or_q(message, hop, distance=-1)
        dq_BLHD = zero_accumulators(own.q_BLHD) if hop else own_dq_BLHD
        key_ranges = ring.key_ranges(ring.queries_of(hop), ring.ring_rank)
        groups = all_groups if hop else first_groups
        add_gradients(ring, key_ranges, groups, rows, kv_2BLGD, dq_BLHD, dkv_2BLGD)
        if returning:
            dq_BLHD = returning.wait().add_(dq_BLHD)
        returning = ring.send_grad_accumulators(dq_BLHD, hop, distance=-1)
        if in_flight:
            message = in_flight.wait()
            q_BLHD, dout_BLHD, lse_BHL, delta_BHL = unpack_bytes(message, payload)
            rows = QuerySide(dout_BLHD, q_BLHD, KnownDelta(delta_BHL, dout_BLHD), lse_BHL)
    add_gradients(ring, ring.own_key_ranges, last_groups, own, kv_2BLGD, own_dq_BLHD, dkv_2BLGD)
    return own_dq_BLHD.add_(returning.wait()) if returning else own_dq_BLHD, dkv_2BLGD


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
