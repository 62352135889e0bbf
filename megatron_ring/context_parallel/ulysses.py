"""Ulysses: the members of a ring rank trade heads for tokens, so that each attends with a few heads of all its tokens.

DeepSpeed Ulysses (Jacobs et al. 2023, section 3): one all-to-all before attention, q_BlHD -> q_BLhD, and one behind it,
out_BLhD -> out_BlHD; gradients take the same ways back. Whatever goes at one time is one message. Attention itself is
another's: between the two every member holds a ring shard and need not know that there are others.

The trade is a ``torch.library`` custom op that finds its group by name, as the ring does (docs/decisions/0002).
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from megatron_ring.parallel.messages import packed, unpacked

# The dimensions of (..., tokens, heads, head size).
_TOKENS, _HEADS = -3, -2


@dataclass(frozen=True)
class UlyssesGroup:
    """Those that share a ring rank: how many, and their group's name, which is what an op can be given."""

    size: int = 1
    group: str = ""

    @staticmethod
    def of(group: dist.ProcessGroup | None) -> "UlyssesGroup":
        return UlyssesGroup(group.size(), group.group_name) if group else UlyssesGroup()


def gather_tokens(
    q_BlHD: torch.Tensor, kv_2BlGD: torch.Tensor, members: UlyssesGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """q_BLhD and kv_2BLgD: of all the members' tokens, the u-th H/U query heads for member u and the keys they read.

    Blocks until all members have called it. One alone trades nothing.
    """
    if members.size == 1:
        return q_BlHD, kv_2BlGD
    assert q_BlHD.shape[_HEADS] % members.size == 0, "query heads that cannot be shared out evenly"
    tensors = [q_BlHD, repeated(kv_2BlGD, members.size)]
    q_BLhD, kv_2BLgD = all_to_all_heads(tensors, _HEADS, _TOKENS, members.size, members.group)
    return q_BLhD, kv_2BLgD


def gather_heads(
    out_BLhD: torch.Tensor, lse_BhL: torch.Tensor, members: UlyssesGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """The way back: out_BlHD and lse_BHl, all heads of this member's own tokens, each in its own type."""
    if members.size == 1:
        return out_BLhD, lse_BhL
    tensors = [out_BLhD, lse_BhL.mT.unsqueeze(-1)]
    out_BlHD, lse_BlH1 = all_to_all_heads(tensors, _TOKENS, _HEADS, members.size, members.group)
    return out_BlHD, lse_BlH1.squeeze(-1).mT


def repeated(kv_2BlGD: torch.Tensor, members: int) -> torch.Tensor:
    """Each key-value head as often, next to itself, as lets ``members`` take equally many: lcm(G, U) heads.

    Query head i of H reads head i // (H/G); H is a multiple of G and of U, so it still does when both are dealt out.
    """
    groups = kv_2BlGD.shape[_HEADS]
    times = math.lcm(groups, members) // groups
    return kv_2BlGD if times == 1 else kv_2BlGD.repeat_interleave(times, dim=_HEADS)


@torch.library.custom_op("megatron_ring::all_to_all_heads", mutates_args=())
def all_to_all_heads(
    tensors: list[torch.Tensor], split: int, join: int, members: int, group: str
) -> list[torch.Tensor]:
    """Each tensor cut along ``split``, a piece for every member; what all send here, in order, joined along ``join``.

    One all-to-all. Types may differ: wider numbers travel as several of the narrowest type, their bits as they are.
    """
    narrowest = min((x.dtype for x in tensors), key=lambda dtype: dtype.itemsize)
    cut = [_as_type(x, narrowest).chunk(members, split) for x in tensors]
    pieces = [piece for of_member in zip(*cut) for piece in of_member]
    received = unpacked(_all_to_all(pieces, group), pieces)
    return [
        torch.cat(received[i :: len(tensors)], join).view(x.dtype) for i, x in enumerate(tensors)
    ]


def _all_to_all(pieces: list[torch.Tensor], group: str) -> torch.Tensor:
    """The first pieces to the first member, and so on, as bytes; what all sent here, alike."""
    message = packed(pieces)
    received = torch.empty_like(message)
    dist.all_to_all_single(received, message, group=_resolve_process_group(group))
    return received


def _as_type(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bits of x as more numbers of a narrower type, along its last dimension."""
    return x if x.dtype == dtype else x.clone(memory_format=torch.contiguous_format).view(dtype)


@all_to_all_heads.register_fake
def _(tensors, split, join, members, group):
    return [torch.cat([x.chunk(members, split)[0]] * members, join) for x in tensors]


def _keep_for_backward(ctx, inputs, output):
    _, ctx.split, ctx.join, *ctx.members = inputs
    ctx.set_materialize_grads(False)  # what nobody read is not traded back


def _backward(ctx, gradients):
    given = [gradient for gradient in gradients if gradient is not None]
    traded = iter(all_to_all_heads(given, ctx.join, ctx.split, *ctx.members))
    return (
        [None if gradient is None else next(traded) for gradient in gradients],
        None,
        None,
        None,
        None,
    )


all_to_all_heads.register_autograd(_backward, setup_context=_keep_for_backward)
