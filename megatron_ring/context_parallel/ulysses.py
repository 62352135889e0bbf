"""Ulysses: ranks that share a ring rank exchange heads for tokens before attention, and back after.

DeepSpeed Ulysses (Jacobs et al. 2023, section 3): one all-to-all before attention, q_BlHD ->
q_BLhD, and one after it, out_BLhD -> out_BlHD; in backward the gradients take the same exchanges in
reverse. Between the two, each rank attends with a share h of the heads to all L tokens of the ring
shard, and attention need not be aware of the other ranks. Tensors that are exchanged together
travel as one message.

The exchange is a ``torch.library`` custom op that finds its group by name, as the ring does
(docs/decisions/0002).
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from megatron_ring.parallel.message_buffers import pack_bytes, unpack_bytes

# The dimensions of (..., tokens, heads, head dim).
_TOKENS, _HEADS = -3, -2


@dataclass(frozen=True)
class UlyssesGroup:
    """The ranks that share a ring rank: their number and, for custom ops, their group's name."""

    size: int = 1
    group: str = ""

    @staticmethod
    def of(group: dist.ProcessGroup | None) -> "UlyssesGroup":
        """Describe a process group; None stands for a single rank."""
        return UlyssesGroup(group.size(), group.group_name) if group else UlyssesGroup()


def gather_tokens(
    q_BlHD: torch.Tensor, kv_2BlGD: torch.Tensor, ulysses: UlyssesGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exchange heads for tokens: return q_BLhD and kv_2BLgD of all the group's tokens.

    Ulysses rank u gets the u-th H/U query heads and the key-value heads that they read. Blocks
    until all ranks of the group have called it; a single rank exchanges nothing.
    """
    if ulysses.size == 1:
        return q_BlHD, kv_2BlGD
    heads = q_BlHD.shape[_HEADS]
    assert heads % ulysses.size == 0, f"{heads} query heads do not divide by {ulysses.size} ranks"
    tensors = [q_BlHD, repeat_kv_heads(kv_2BlGD, ulysses.size)]
    q_BLhD, kv_2BLgD = all_to_all_heads(tensors, _HEADS, _TOKENS, ulysses.size, ulysses.group)
    return q_BLhD, kv_2BLgD


def gather_heads(
    out_BLhD: torch.Tensor, lse_BhL: torch.Tensor, ulysses: UlyssesGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exchange tokens for heads: return out_BlHD and lse_BHl of this rank's tokens.

    Each keeps its type. Blocks like ``gather_tokens``.
    """
    if ulysses.size == 1:
        return out_BLhD, lse_BhL
    tensors = [out_BLhD, lse_BhL.mT.unsqueeze(-1)]
    out_BlHD, lse_BlH1 = all_to_all_heads(tensors, _TOKENS, _HEADS, ulysses.size, ulysses.group)
    return out_BlHD, lse_BlH1.squeeze(-1).mT


def repeat_kv_heads(kv_2BlGD: torch.Tensor, ranks: int) -> torch.Tensor:
    """Repeat each key-value head, next to itself, until ``ranks`` divides their number: lcm(G, U).

    Query head i of H reads head i // (H/G). H is a multiple of both G and U, so that it still reads
    the same head when query heads and repeated heads are split over the ranks.
    """
    groups = kv_2BlGD.shape[_HEADS]
    times = math.lcm(groups, ranks) // groups
    return kv_2BlGD if times == 1 else kv_2BlGD.repeat_interleave(times, dim=_HEADS)


@torch.library.custom_op("megatron_ring::all_to_all_heads", mutates_args=())
def all_to_all_heads(
    tensors: list[torch.Tensor], split: int, join: int, ranks: int, group: str
) -> list[torch.Tensor]:
    """Send each rank its piece of every tensor along ``split``; join the received along ``join``.

    One all-to-all for all tensors. Their types may differ: elements of wider types travel as
    several elements of the narrowest type, bit for bit.
    """
    narrowest = min((x.dtype for x in tensors), key=lambda dtype: dtype.itemsize)
    pieces_by_tensor = [_view_as_narrower(x, narrowest).chunk(ranks, split) for x in tensors]
    pieces = [piece for pieces_for_rank in zip(*pieces_by_tensor) for piece in pieces_for_rank]
    received = unpack_bytes(_all_to_all(pieces, group), pieces)
    return [
        torch.cat(received[i :: len(tensors)], join).view(x.dtype) for i, x in enumerate(tensors)
    ]


def _all_to_all(pieces: list[torch.Tensor], group: str) -> torch.Tensor:
    """Send the pieces as bytes, the first ones to the first rank; return the received bytes."""
    message = pack_bytes(pieces)
    received = torch.empty_like(message)
    dist.all_to_all_single(received, message, group=_resolve_process_group(group))
    return received


def _view_as_narrower(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the bits of x as more elements of a narrower type, along the last dimension."""
    return x if x.dtype == dtype else x.clone(memory_format=torch.contiguous_format).view(dtype)


@all_to_all_heads.register_fake
def _(tensors, split, join, ranks, group):
    return [torch.cat([x.chunk(ranks, split)[0]] * ranks, join) for x in tensors]


def _save_for_backward(ctx, inputs, output):
    _, ctx.split, ctx.join, *ctx.ranks_and_group = inputs
    ctx.set_materialize_grads(False)  # outputs that were not used are not exchanged in backward


def _backward(ctx, gradients):
    present = [gradient for gradient in gradients if gradient is not None]
    exchanged = iter(all_to_all_heads(present, ctx.join, ctx.split, *ctx.ranks_and_group))
    of_tensors = [None if gradient is None else next(exchanged) for gradient in gradients]
    return of_tensors, None, None, None, None


all_to_all_heads.register_autograd(_backward, setup_context=_save_for_backward)
