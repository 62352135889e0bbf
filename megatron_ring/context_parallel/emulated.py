"""A ring in one process: the hops of all its ranks one after the other, in the ring's order, and nothing sent.

For measuring and drawing what a ring of any size computes on one device. Results are those of ``ring.py`` but for the
order in which a hop's gradients are added up.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask, hop_runs
from megatron_ring.kernels.attention import HopKernel
from megatron_ring.kernels.attention.state import RunningSoftmax


class Attention(NamedTuple):
    """An output and its gradients, each (batch, S, heads, head size)."""

    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def attention(inputs: Sequence[torch.Tensor], layout: Layout, kernel: HopKernel, mask: Mask = CAUSAL) -> Attention:
    """Of one whole sequence by a ring of ``layout.ring_size``. ``inputs``: q, k, v and the gradient of the output.

    All of it in their type, as a model has it.
    """
    q, k, v, dout = inputs
    ranks, scale, dtype = range(layout.ring_size), q.shape[-1] ** -0.5, q.dtype
    at = [layout.positions(rank).to(q.device) for rank in ranks]
    q, dout, k, v = ([x[:, rows].contiguous() for rows in at] for x in (q, dout, k, v))
    states = [RunningSoftmax.empty(x) for x in q]
    hops = [(rank, (rank - hop) % layout.ring_size) for hop in ranks for rank in ranks]
    for rank, source in hops:
        kernel.forward(q[rank], k[source], v[source], hop_runs(layout, rank, source, mask), scale, states[rank])
    dq, dk, dv = ([torch.zeros_like(x, dtype=states[0].out_BLHD.dtype) for x in shards] for shards in (q, k, v))
    for rank, source in hops:
        kernel.backward(
            dout[rank], q[rank], k[source], v[source], states[rank].out_BLHD.to(dtype), states[rank].lse_BHL,
            hop_runs(layout, rank, source, mask), scale, dq[rank], dk[source], dv[source],
        )  # fmt: skip
    home = torch.cat(at).argsort()
    return Attention(*(torch.cat(parts, 1)[:, home].to(dtype) for parts in ([s.out_BLHD for s in states], dq, dk, dv)))
