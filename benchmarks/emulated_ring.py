"""Ring attention in one process: the hops of all ranks run one after another, and nothing is sent.

Used to draw the rounding errors of a ring of any size, and of one that rounds what it accumulates.
Results are those of ``ring.py`` up to the order in which the gradients of a hop are accumulated. It
passes kernels all heads at once and nothing that was received, so it does not show whether a kernel
is correct in training; ``streamed_ring.attention`` does.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask, hop_key_ranges
from megatron_ring.context_parallel.ring import fold_in_dlse
from megatron_ring.kernels.attention import GradientAccumulators, HopInputs, HopKernel
from megatron_ring.kernels.attention.running_softmax import (
    KnownDelta,
    RunningSoftmax,
    delta_of,
    zero_accumulators,
)


class Attention(NamedTuple):
    """Attention's output and the gradients of q, k and v, each (batch, S, heads, head dim)."""

    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def attention(
    inputs: Sequence[torch.Tensor],
    layout: Layout,
    kernel: HopKernel,
    mask: Mask = CAUSAL,
    queries_travel: bool = False,
    then: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Attention:
    """Compute attention of one whole sequence as a ring of ``layout.ring_size`` ranks would.

    Args:
        inputs: q, k, v and the gradient of the output; their dtype is that of the results.
        queries_travel: In the backward pass, queries of other ranks come with delta instead of
            with their output.
        then: A function of out_BSHD and lse_BHS that is applied after attention. The output and
            its gradient are then those of its result. It gives the log-sum-exp a gradient, as
            attention sinks do.
    """
    ranks = range(layout.ring_size)
    scale = inputs[0].shape[-1] ** -0.5
    dtype = inputs[0].dtype
    positions = [layout.positions(rank).to(inputs[0].device) for rank in ranks]
    to_sequence_order = torch.cat(positions).argsort()
    q, k, v = ([x[:, rows].contiguous() for rows in positions] for x in inputs[:3])
    states = [RunningSoftmax.empty(x) for x in q]
    hops = [(rank, (rank - hop) % layout.ring_size) for hop in ranks for rank in ranks]
    hop_inputs = {
        (rank, source): HopInputs(
            q[rank], k[source], v[source], hop_key_ranges(layout, rank, source, mask), scale
        )
        for rank, source in hops
    }

    for rank, source in hops:
        kernel.forward(hop_inputs[rank, source], states[rank])
    out = torch.cat([state.out_BLHD for state in states], 1)[:, to_sequence_order].to(dtype)
    lse = torch.cat([state.lse_BHL for state in states], 2)[:, :, to_sequence_order]
    dout = inputs[3]
    dlse = None
    if then:
        out.requires_grad_()
        lse.requires_grad_()
        result = then(out, lse)
        dout, dlse = torch.autograd.grad(result, (out, lse), dout)
        out = out.detach()
        result = result.detach()

    own = []
    for rows in positions:
        local_dlse = None if dlse is None else dlse[:, :, rows].contiguous()
        own.append(fold_in_dlse(local_dlse, dout[:, rows].contiguous(), out[:, rows]))
    dq, dk, dv = ([zero_accumulators(x) for x in shards] for shards in (q, k, v))
    for rank, source in hops:
        dout_BLHD, out_or_delta = own[rank]
        if queries_travel and rank != source:
            out_or_delta = KnownDelta(delta_of(out_or_delta, dout_BLHD), dout_BLHD)
        kernel.backward(
            hop_inputs[rank, source],
            dout_BLHD,
            out_or_delta,
            states[rank].lse_BHL,
            GradientAccumulators(dq[rank], dk[source], dv[source]),
        )
    gradients = (torch.cat(shards, 1)[:, to_sequence_order].to(dtype) for shards in (dq, dk, dv))
    return Attention(result if then else out, *gradients)
