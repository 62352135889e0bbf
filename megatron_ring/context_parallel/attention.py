"""Attention over a sequence that is split over a ring of Ulysses groups, as the model calls it.

Each rank holds one shard of the ring, or its part of one where several Ulysses ranks share a ring
rank. These exchange heads for tokens before the ring and tokens for heads after it.

The ring is a ``torch.library`` custom op, forward and backward, so that autograd, selective
activation checkpointing and the compiler see one node whose results are the output and the
log-sum-exp: recomputing a layer can keep both and never runs the ring a second time. A custom op
takes only tensors, numbers and strings, so ``RingSpec`` passes the ring's communicators by the
names that torch.distributed gave them and the kernel by its own (docs/decisions/0002), and the
progress of this process (``ProgressTracker``) is passed as a tensor. The operators write to that
tensor although their schemas do not declare it (docs/decisions/0022).
"""

from collections.abc import Sequence
from dataclasses import astuple
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from megatron_ring.context_parallel import invariant, ulysses
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.hop_cost import with_work_count
from megatron_ring.context_parallel.layout import DocumentPlacement, Layout
from megatron_ring.context_parallel.mask import mask_of_documents, mask_of_window
from megatron_ring.kernels.attention import KERNELS, stack_to_kernel_layout, to_kernel_layout
from megatron_ring.kernels.attention.running_softmax import accumulation_dtype
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.progress import Direction, ProgressTracker

# Accumulation order. arrival: in hop order. invariant: the same for rings of 1, 2, 4 and 8 ranks.
REDUCTIONS = {"arrival": ring_loop, "invariant": invariant}


class ContextParallelAttention:
    """Computes the attention of this process's queries over the whole sequence.

    Every call communicates on the two communicators of the ring and in the Ulysses group, and
    blocks. All of their ranks must call it equally often, with the same shapes and the same mask.

    Args:
        kernel: a key of ``KERNELS``.
        progress: where the ring records its progress; ``progress.layer`` must be set before a call.
        reduction: a key of ``REDUCTIONS``.
    """

    def __init__(
        self,
        layout: Layout,
        kernel: str,
        groups: ProcessGroups,
        progress: ProgressTracker | None = None,
        reduction: str = "arrival",
    ):
        ring_size = dist.get_world_size(groups.ring_links[0]) if groups.ring_links else 1
        assert layout.ring_size == ring_size, "the layout is for another ring size than the groups"
        self.layout = layout
        self.kernel = kernel
        self.links = tuple(group.group_name for group in groups.ring_links or ())
        self.ulysses_group = ulysses.UlyssesGroup.of(groups.ulysses)
        self.progress = progress or ProgressTracker()
        self.reduction = reduction

    def __call__(
        self,
        q_BlHD: torch.Tensor,
        k_BlGD: torch.Tensor,
        v_BlGD: torch.Tensor,
        window: int = 0,
        document_starts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out_BlHD in q's type and lse_BHl of the scores; both have gradients.

        Args:
            q_BlHD: queries of this process's tokens, in the order of ``Layout.positions``, with
                RoPE applied; k and v alike, with G key-value heads.
            window: number of keys a token sees, itself included; 0 for all keys up to itself.
            document_starts: (documents,) int64 on the CPU, increasing: where documents begin when
                the samples of the batch are concatenated.
        """
        kv_2BlGD = stack_to_kernel_layout(self.kernel, [k_BlGD, v_BlGD])
        q_BLhD, kv_2BLgD = ulysses.gather_tokens(q_BlHD, kv_2BlGD, self.ulysses_group)
        out_BLhD, lse_BhL = self._attend_shards(q_BLhD, kv_2BLgD, window, document_starts)
        return ulysses.gather_heads(out_BLhD, lse_BhL, self.ulysses_group)

    def _attend_shards(
        self,
        q_BLHD: torch.Tensor,
        kv_2BLGD: torch.Tensor,
        window: int,
        document_starts: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, *_ = q_BLHD.shape
        assert length == self.layout.shard_length, (
            f"queries of length {length}, but the layout's shard has {self.layout.shard_length}"
        )
        spec = RingSpec(
            layout=self.layout.name,
            kernel=self.kernel,
            reduction=self.reduction,
            links=self.links,
            stripe_size=self.layout.stripe_size,
            window=window,
            samples=1 if document_starts is None else batch,
            layer=self.progress.layer,
            placement=self.layout.placement,
        )
        if document_starts is not None:
            # Samples have different documents but a hop has one mask, so samples are concatenated.
            q_BLHD = q_BLHD.flatten(0, 1).unsqueeze(0)
            kv_2BLGD = kv_2BLGD.flatten(1, 2).unsqueeze(1)
        out_BLHD, lse_BHL = ring_attention(
            to_kernel_layout(self.kernel, q_BLHD),
            to_kernel_layout(self.kernel, kv_2BLGD),
            document_starts,
            self.progress.buffer,
            *spec.to_op_arguments(),
        )
        if document_starts is not None:
            out_BLHD = out_BLHD.view(batch, length, *out_BLHD.shape[2:])
            lse_BHL = lse_BHL.view(-1, batch, length).transpose(0, 1)
        return out_BLHD, lse_BHL


class RingSpec(NamedTuple):
    """Everything but tensors that the ring operators need, in values that an operator can take.

    ``to_op_arguments`` and ``from_op_arguments`` are the only places that define the packed form.

    Attributes:
        layout: a name of ``layout.NAMES``.
        kernel: a key of ``KERNELS``.
        reduction: a key of ``REDUCTIONS``.
        links: group names of the ring's two communicators; empty for a ring of one rank.
        stripe_size: of a striped layout, in tokens.
        window: number of keys a token sees, itself included; 0 for no window.
        samples: number of samples concatenated along L; 1 without packed documents.
        layer: index of the layer in the whole model, for progress reports.
        placement: of the layout; None if it places no documents.
    """

    layout: str
    kernel: str
    reduction: str = "arrival"
    links: tuple[str, ...] = ()
    stripe_size: int = 1
    window: int = 0
    samples: int = 1
    layer: int = 0
    placement: DocumentPlacement | None = None

    def to_op_arguments(self) -> tuple[str, list[int]]:
        """Return the operators' ``names`` and ``sizes``."""
        names = " ".join((self.layout, self.kernel, self.reduction, *self.links))
        sizes = [self.stripe_size, self.window, self.samples, self.layer]
        return names, sizes + (list(astuple(self.placement)) if self.placement else [])

    @staticmethod
    def from_op_arguments(names: str, sizes: Sequence[int]) -> "RingSpec":
        """Invert ``to_op_arguments``."""
        layout, kernel, reduction, *links = names.split(" ")
        four, of_placement = sizes[:4], sizes[4:]
        placement = DocumentPlacement(*of_placement) if of_placement else None
        return RingSpec(layout, kernel, reduction, tuple(links), *four, placement)


@torch.library.custom_op("megatron_ring::ring_attention", mutates_args=())
def ring_attention(
    q_BLHD: torch.Tensor,
    kv_2BLGD: torch.Tensor,
    document_starts: torch.Tensor | None,
    progress: torch.Tensor | None,
    names: str,
    sizes: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the ring forward; ``names`` and ``sizes`` are a RingSpec.

    With ``document_starts``, L is the length of ``samples`` concatenated shards. ``progress`` is
    the buffer of a ProgressTracker; it is written to during the call (docs/decisions/0022).
    Communicates on the ring's two communicators and blocks.
    """
    spec = RingSpec.from_op_arguments(names, sizes)
    tracker = ProgressTracker(progress)
    ring = _ring(q_BLHD, document_starts, tracker, spec)
    with tracker.in_ring(spec.layer, Direction.FORWARD):
        return REDUCTIONS[spec.reduction].forward(q_BLHD, kv_2BLGD, ring)


@torch.library.custom_op("megatron_ring::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    dout_BLHD: torch.Tensor,
    dlse_BHL: torch.Tensor | None,
    q_BLHD: torch.Tensor,
    kv_2BLGD: torch.Tensor,
    out_BLHD: torch.Tensor,
    lse_BHL: torch.Tensor,
    document_starts: torch.Tensor | None,
    progress: torch.Tensor | None,
    names: str,
    sizes: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the ring backward and cast the gradients to the types of q and kv.

    The last four arguments are those of ``ring_attention``; ``progress`` is written to here too.
    """
    spec = RingSpec.from_op_arguments(names, sizes)
    tracker = ProgressTracker(progress)
    ring = _ring(q_BLHD, document_starts, tracker, spec)
    with tracker.in_ring(spec.layer, Direction.BACKWARD):
        dq_BLHD, dkv_2BLGD = REDUCTIONS[spec.reduction].backward(
            dout_BLHD, dlse_BHL, q_BLHD, kv_2BLGD, out_BLHD, lse_BHL, ring
        )
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


def _save_for_backward(ctx, inputs, output):
    q_BLHD, kv_2BLGD, *ctx.settings = inputs
    ctx.save_for_backward(q_BLHD, kv_2BLGD, *output)
    ctx.set_materialize_grads(False)  # so that dlse is None where lse has no gradient


def _backward(ctx, dout_BLHD, dlse_BHL):
    q_BLHD, kv_2BLGD, out_BLHD, lse_BHL = ctx.saved_tensors
    dout_BLHD = torch.zeros_like(out_BLHD) if dout_BLHD is None else dout_BLHD.contiguous()
    gradients = ring_attention_backward(
        dout_BLHD, dlse_BHL, q_BLHD, kv_2BLGD, out_BLHD, lse_BHL, *ctx.settings
    )
    return *gradients, *(None for _ in ctx.settings)


ring_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _ring(
    q_BLHD: torch.Tensor,
    document_starts: torch.Tensor | None,
    progress: ProgressTracker,
    spec: RingSpec,
) -> ring_loop.Ring:
    exchange = _exchange(spec.links, progress) if spec.links else None
    ring_size = len(exchange.members) if exchange else 1
    seq_length = q_BLHD.shape[1] // spec.samples * ring_size
    layout = Layout(spec.layout, seq_length, ring_size, spec.stripe_size, spec.placement)
    if document_starts is None:
        mask = mask_of_window(spec.window)
    else:
        mask = mask_of_documents(document_starts, spec.window, spec.samples, layout)
    return ring_loop.Ring(
        layout=layout,
        ring_rank=exchange.ring_rank if exchange else 0,
        kernel=with_work_count(KERNELS[spec.kernel], progress),
        scale=q_BLHD.shape[-1] ** -0.5,
        exchange=exchange,
        mask=mask,
        on_hop=progress.begin_hop,
        splits_own_work=exchange is None or exchange.is_slow,
    )


def _exchange(links: tuple[str, ...], progress: ProgressTracker) -> RingExchange:
    groups = tuple(_resolve_process_group(name) for name in links)
    return RingExchange.over(groups, progress)
