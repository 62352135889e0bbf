"""What the model calls: causal attention over a sequence that is split over a ring, as one operator.

The ring is a ``torch.library`` custom op, forward and backward, so that autograd, selective activation checkpointing
and the compiler see one node with the output and the log-sum-exp as its results: recomputing a layer can keep them
and never runs the ring a second time. An op takes tensors, numbers and text, so the ring's communicators are passed
by the names torch.distributed gives them and the kernel by its own.
"""

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.kernels.attention import KERNELS
from megatron_ring.kernels.attention.state import accumulation_dtype
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange


class ContextParallelAttention:
    """Causal attention of local queries over the whole sequence, given the layout, a kernel by name and the groups.

    Called with q (batch, L, query heads, head size) and k, v (batch, L, key-value heads, head size) of this ring
    rank's tokens, in the layout's order and with RoPE applied; returns the output like q. Talks on the ring's two
    communicators; every rank of the ring must call it equally often.
    """

    def __init__(self, layout: Layout, kernel: str, groups: ProcessGroups):
        ring_size = dist.get_world_size(groups.ring_links[0]) if groups.ring_links else 1
        assert layout.ring_size == ring_size, "a layout for another ring than the groups'"
        self.layout = layout
        self.kernel = kernel
        self.links = " ".join(group.group_name for group in groups.ring_links or ())

    def __call__(self, q_BLHD: torch.Tensor, k_BLGD: torch.Tensor, v_BLGD: torch.Tensor) -> torch.Tensor:
        assert q_BLHD.shape[1] == self.layout.shard_length, "queries of another length than the layout's shard"
        kv_2BLGD = torch.stack([k_BLGD, v_BLGD])
        out_BLHD, _ = ring_attention(
            q_BLHD, kv_2BLGD, self.layout.name, self.layout.stripe_size, self.kernel, self.links
        )
        return out_BLHD


@torch.library.custom_op("megatron_ring::ring_attention", mutates_args=())
def ring_attention(
    q_BLHD: torch.Tensor, kv_2BLGD: torch.Tensor, layout: str, stripe_size: int, kernel: str, links: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ring.forward`` over the ring whose communicators are named in ``links`` (empty: a ring of one)."""
    return ring_loop.forward(q_BLHD, kv_2BLGD, _ring(q_BLHD, layout, stripe_size, kernel, links))


@torch.library.custom_op("megatron_ring::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    dout_BLHD: torch.Tensor,
    q_BLHD: torch.Tensor,
    kv_2BLGD: torch.Tensor,
    out_BLHD: torch.Tensor,
    lse_BHL: torch.Tensor,
    layout: str,
    stripe_size: int,
    kernel: str,
    links: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ring.backward``, its gradients cast to the types of q and kv."""
    ring = _ring(q_BLHD, layout, stripe_size, kernel, links)
    dq_BLHD, dkv_2BLGD = ring_loop.backward(dout_BLHD, q_BLHD, kv_2BLGD, out_BLHD, lse_BHL, ring)
    return dq_BLHD.to(q_BLHD.dtype), dkv_2BLGD.to(kv_2BLGD.dtype)


@ring_attention.register_fake
def _(q_BLHD, kv_2BLGD, layout, stripe_size, kernel, links):
    batch, length, heads, _ = q_BLHD.shape
    lse_BHL = q_BLHD.new_empty((batch, heads, length), dtype=accumulation_dtype(q_BLHD.dtype))
    return torch.empty_like(q_BLHD, memory_format=torch.contiguous_format), lse_BHL


@ring_attention_backward.register_fake
def _(dout_BLHD, q_BLHD, kv_2BLGD, out_BLHD, lse_BHL, layout, stripe_size, kernel, links):
    return torch.empty_like(q_BLHD, memory_format=torch.contiguous_format), torch.empty_like(kv_2BLGD)


def _keep_for_backward(ctx, inputs, output):
    q_BLHD, kv_2BLGD, *ctx.settings = inputs
    ctx.save_for_backward(q_BLHD, kv_2BLGD, *output)


def _backward(ctx, dout_BLHD, _dlse_BHL):
    gradients = ring_attention_backward(dout_BLHD.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return *gradients, *(None for _ in ctx.settings)


ring_attention.register_autograd(_backward, setup_context=_keep_for_backward)


def _ring(q_BLHD: torch.Tensor, layout: str, stripe_size: int, kernel: str, links: str) -> ring_loop.Ring:
    exchange = _exchange(links) if links else None
    ring_size = len(exchange.members) if exchange else 1
    return ring_loop.Ring(
        layout=Layout(layout, q_BLHD.shape[1] * ring_size, ring_size, stripe_size),
        ring_rank=exchange.ring_rank if exchange else 0,
        kernel=KERNELS[kernel],
        scale=q_BLHD.shape[-1] ** -0.5,
        exchange=exchange,
    )


def _exchange(links: str) -> RingExchange:
    groups = tuple(_resolve_process_group(name) for name in links.split())
    return RingExchange(tuple(dist.get_process_group_ranks(groups[0])), groups, dist.get_rank(groups[0]))
