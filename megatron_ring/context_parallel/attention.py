"""What the model calls: attention over a sequence that is split over a ring of Ulysses groups.

Around the ring, the members of a Ulysses group trade heads for tokens and back; within it, a rank holds a ring shard.

The ring is a ``torch.library`` custom op, forward and backward, so that autograd, selective activation checkpointing
and the compiler see one node with the output and the log-sum-exp as its results: recomputing a layer can keep them
and never runs the ring a second time. An op takes tensors, numbers and text, so the ring's communicators are passed
by the names torch.distributed gives them, the kernel by its own, and the progress of the process (``ProgressTracker``)
as a tensor. The operators write to that tensor without declaring it in their schemas: no operator reads it.
"""

import functools

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from megatron_ring.context_parallel import invariant, ulysses
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.counted import counted
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import mask_of_documents, mask_of_window
from megatron_ring.kernels.attention import KERNELS, stack_to_kernel_layout, to_kernel_layout
from megatron_ring.kernels.attention.state import accumulation_dtype
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.progress import Direction, ProgressTracker

# In which order a ring adds up: as the hops bring it, or the same for rings of 1, 2, 4 and 8.
REDUCTIONS = {"arrival": ring_loop, "invariant": invariant}


class ContextParallelAttention:
    """Attention of local queries over the whole sequence, given the layout, a kernel by name and the groups.

    ``place`` is where it notes what it does; it must know the layer when it is called. ``reduction``: of REDUCTIONS.
    Talks on the ring's two communicators and in the Ulysses group, and blocks; all of their ranks must call it equally
    often and alike.
    """

    def __init__(
        self,
        layout: Layout,
        kernel: str,
        groups: ProcessGroups,
        place: ProgressTracker | None = None,
        reduction: str = "arrival",
    ):
        ring_size = dist.get_world_size(groups.ring_links[0]) if groups.ring_links else 1
        assert layout.ring_size == ring_size, "a layout for another ring than the groups'"
        self.layout = layout
        self.kernel = kernel
        self.links = " ".join(group.group_name for group in groups.ring_links or ())
        self.members = ulysses.UlyssesGroup.of(groups.ulysses)
        self.place = place or ProgressTracker()
        self.reduction = reduction

    def __call__(
        self,
        q_BlHD: torch.Tensor,
        k_BlGD: torch.Tensor,
        v_BlGD: torch.Tensor,
        window: int = 0,
        document_starts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out_BlHD, like q, and lse_BHl of the scores; both have gradients.

        q is (batch, l, query heads, head size), k and v have key-value heads: this process's tokens, as
        ``Layout.positions`` has them, RoPE applied. ``window``: keys a token sees, itself included; 0 is all behind it.
        ``document_starts``: (documents,) int64 on the CPU, increasing, where documents begin when the batch's samples
        are laid end to end.
        """
        kv_2BlGD = stack_to_kernel_layout(self.kernel, [k_BlGD, v_BlGD])
        q_BLhD, kv_2BLgD = ulysses.gather_tokens(q_BlHD, kv_2BlGD, self.members)
        out_BLhD, lse_BhL = self._of_shards(q_BLhD, kv_2BLgD, window, document_starts)
        return ulysses.gather_heads(out_BLhD, lse_BhL, self.members)

    def _of_shards(
        self,
        q_BLHD: torch.Tensor,
        kv_2BLGD: torch.Tensor,
        window: int,
        document_starts: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, *_ = q_BLHD.shape
        assert length == self.layout.shard_length, (
            "queries of another length than the layout's shard"
        )
        settings = window, self.layout.name, self.layout.stripe_size, self.kernel, self.links
        settings += self.place.layer, self.place.numbers, self.reduction
        arrange = functools.partial(to_kernel_layout, self.kernel)
        if document_starts is None:
            return ring_attention(arrange(q_BLHD), arrange(kv_2BLGD), None, 1, *settings)
        # Each sample has documents of its own, and a hop one mask: the samples become one, end to end.
        q_1NHD, kv_21NGD = q_BLHD.flatten(0, 1).unsqueeze(0), kv_2BLGD.flatten(1, 2).unsqueeze(1)
        out_1NHD, lse_1HN = ring_attention(
            arrange(q_1NHD), arrange(kv_21NGD), document_starts, batch, *settings
        )
        return out_1NHD.view_as(q_BLHD), lse_1HN.view(-1, batch, length).transpose(0, 1)


@torch.library.custom_op("megatron_ring::ring_attention", mutates_args=())
def ring_attention(
    q_BLHD: torch.Tensor,
    kv_2BLGD: torch.Tensor,
    document_starts: torch.Tensor | None,
    samples: int,
    window: int,
    layout: str,
    stripe_size: int,
    kernel: str,
    links: str,
    layer: int = 0,
    place: torch.Tensor | None = None,
    reduction: str = "arrival",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``forward`` of ``REDUCTIONS[reduction]`` over the ring whose communicators ``links`` names; empty: a ring of one.

    With ``document_starts``, L is that of ``samples`` shards end to end. ``place``: a ProgressTracker' numbers.
    """
    noted = ProgressTracker(place)
    ring = _ring(
        q_BLHD, document_starts, samples, window, layout, stripe_size, kernel, links, noted
    )
    with noted.in_ring(layer, Direction.FORWARD):
        return REDUCTIONS[reduction].forward(q_BLHD, kv_2BLGD, ring)


@torch.library.custom_op("megatron_ring::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    dout_BLHD: torch.Tensor,
    dlse_BHL: torch.Tensor | None,
    q_BLHD: torch.Tensor,
    kv_2BLGD: torch.Tensor,
    out_BLHD: torch.Tensor,
    lse_BHL: torch.Tensor,
    document_starts: torch.Tensor | None,
    samples: int,
    window: int,
    layout: str,
    stripe_size: int,
    kernel: str,
    links: str,
    layer: int = 0,
    place: torch.Tensor | None = None,
    reduction: str = "arrival",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``backward`` of ``REDUCTIONS[reduction]``, its gradients cast to the types of q and kv."""
    noted = ProgressTracker(place)
    ring = _ring(
        q_BLHD, document_starts, samples, window, layout, stripe_size, kernel, links, noted
    )
    with noted.in_ring(layer, Direction.BACKWARD):
        reduce = REDUCTIONS[reduction].backward
        dq_BLHD, dkv_2BLGD = reduce(dout_BLHD, dlse_BHL, q_BLHD, kv_2BLGD, out_BLHD, lse_BHL, ring)
    return dq_BLHD.to(q_BLHD.dtype), dkv_2BLGD.to(kv_2BLGD.dtype)


@ring_attention.register_fake
def _(q_BLHD, kv_2BLGD, *settings):
    batch, length, heads, _ = q_BLHD.shape
    lse_BHL = q_BLHD.new_empty((batch, heads, length), dtype=accumulation_dtype(q_BLHD.dtype))
    return torch.empty_like(q_BLHD, memory_format=torch.contiguous_format), lse_BHL


@ring_attention_backward.register_fake
def _(dout_BLHD, dlse_BHL, q_BLHD, kv_2BLGD, *rest):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BLHD, kv_2BLGD)
    )


def _keep_for_backward(ctx, inputs, output):
    q_BLHD, kv_2BLGD, ctx.document_starts, *ctx.settings = inputs
    ctx.save_for_backward(q_BLHD, kv_2BLGD, *output)
    ctx.set_materialize_grads(False)  # that None says lse has no gradient


def _backward(ctx, dout_BLHD, dlse_BHL):
    q_BLHD, kv_2BLGD, out_BLHD, lse_BHL = ctx.saved_tensors
    dout_BLHD = torch.zeros_like(out_BLHD) if dout_BLHD is None else dout_BLHD.contiguous()
    gradients = ring_attention_backward(
        dout_BLHD, dlse_BHL, q_BLHD, kv_2BLGD, out_BLHD, lse_BHL, ctx.document_starts, *ctx.settings
    )
    return *gradients, None, *(None for _ in ctx.settings)


ring_attention.register_autograd(_backward, setup_context=_keep_for_backward)


def _ring(
    q_BLHD: torch.Tensor,
    document_starts: torch.Tensor | None,
    samples: int,
    window: int,
    layout: str,
    stripe_size: int,
    kernel: str,
    links: str,
    place: ProgressTracker,
) -> ring_loop.Ring:
    exchange = _exchange(links, place) if links else None
    ring_size = len(exchange.members) if exchange else 1
    packed = document_starts is not None
    mask = mask_of_documents(document_starts, window, samples) if packed else mask_of_window(window)
    return ring_loop.Ring(
        layout=Layout(layout, q_BLHD.shape[1] // samples * ring_size, ring_size, stripe_size),
        ring_rank=exchange.ring_rank if exchange else 0,
        kernel=counted(KERNELS[kernel], place),
        scale=q_BLHD.shape[-1] ** -0.5,
        exchange=exchange,
        mask=mask,
        on_hop=place.begin_hop,
        in_halves=exchange is None or exchange.is_slow,
    )


def _exchange(links: str, place: ProgressTracker) -> RingExchange:
    return RingExchange.over(tuple(_resolve_process_group(name) for name in links.split()), place)
