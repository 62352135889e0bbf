"""A ring in one process: the hops of all its ranks one after the other, in the ring's order, and nothing sent.

For measuring and drawing what a ring of any size computes on one device. Results are those of ``ring.py`` but for the
order in which a hop's gradients are added up.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask, hop_runs
from megatron_ring.context_parallel.ring import with_gradient_of_lse
from megatron_ring.kernels.attention import HopKernel
from megatron_ring.kernels.attention.state import KnownDelta, RunningSoftmax, delta_of, zero_sums


class Attention(NamedTuple):
    """An output and its gradients, each (batch, S, heads, head size)."""

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
    """Attention of one whole sequence by a ring of ``layout.ring_size``, in the type of the inputs.

    inputs: q, k, v and the gradient of the output.
    queries_travel: backward, visiting queries bring delta instead of their output.
    then: what follows, as a function of out_BSHD and lse_BHS; the output and its gradient are those
        of its result. It gives the log-sum-exp a gradient, as attention sinks do.
    """
    ranks, scale, dtype = range(layout.ring_size), inputs[0].shape[-1] ** -0.5, inputs[0].dtype
    at = [layout.positions(rank).to(inputs[0].device) for rank in ranks]
    home = torch.cat(at).argsort()
    q, k, v = ([x[:, rows].contiguous() for rows in at] for x in inputs[:3])
    states = [RunningSoftmax.empty(x) for x in q]
    hops = [(rank, (rank - hop) % layout.ring_size) for hop in ranks for rank in ranks]
    runs = {hop: hop_runs(layout, *hop, mask) for hop in hops}
    for rank, source in hops:
        kernel.forward(q[rank], k[source], v[source], runs[rank, source], scale, states[rank])
    out = torch.cat([state.out_BLHD for state in states], 1)[:, home].to(dtype)
    lse = torch.cat([state.lse_BHL for state in states], 2)[:, :, home]
    dout, dlse = inputs[3], None
    if then:
        out.requires_grad_(), lse.requires_grad_()
        result = then(out, lse)
        dout, dlse = torch.autograd.grad(result, (out, lse), dout)
        out, result = out.detach(), result.detach()
    own = []
    for rows in at:
        of_rows = None if dlse is None else dlse[:, :, rows].contiguous()
        own.append(with_gradient_of_lse(of_rows, dout[:, rows].contiguous(), out[:, rows]))
    dq, dk, dv = ([zero_sums(x) for x in shards] for shards in (q, k, v))
    for rank, source in hops:
        dout_BLHD, of_rank = own[rank]
        if queries_travel and rank != source:
            of_rank = KnownDelta(delta_of(of_rank, dout_BLHD), dout_BLHD)
        kernel.backward(
            dout_BLHD, q[rank], k[source], v[source], of_rank, states[rank].lse_BHL,
            runs[rank, source], scale, dq[rank], dk[source], dv[source],
        )  # fmt: skip
    gradients = (torch.cat(shards, 1)[:, home].to(dtype) for shards in (dq, dk, dv))
    return Attention(result if then else out, *gradients)
