"""RoPE (Su et al. 2021, section 3.2.2) of queries and keys, which are read and written once.

The rotated keys and the values are written side by side, as one message of the ring. Products are
float32 and results are rounded once. Custom ops, as in norm_kernels.py. In this file ``N`` is the
tokens, B x l.
"""

import torch
import triton
import triton.language as tl

from megatron_ring.kernels.fused.triton.launch import as_rows, warps_for

MOST_PAIRS = 2048
"""Pairs of elements that one program rotates, of one token."""


@triton.jit
def _copy_heads(x, y, first, heads, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr):
    """Copy some heads of one token from ``x`` to ``y``, in halves."""
    head, pair = first + tl.arange(0, HEADS), tl.arange(0, P)
    exists = (head < heads)[:, None] & (pair < HEAD_DIM // 2)[None, :]
    at = head[:, None] * HEAD_DIM + pair[None, :]
    for half in tl.static_range(2):
        offset = at + half * (HEAD_DIM // 2)
        tl.store(y + offset, tl.load(x + offset, mask=exists), mask=exists)


@triton.jit
def _rotate_heads(
    x, y, cos, sin, first, heads,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Rotate some heads of one token from ``x`` to ``y``; backward by the opposite angles."""
    head, pair = first + tl.arange(0, HEADS), tl.arange(0, P)
    is_pair = pair < HEAD_DIM // 2
    exists = (head < heads)[:, None] & is_pair[None, :]
    at = head[:, None] * HEAD_DIM + pair[None, :]
    cos_1P = tl.load(cos + pair, mask=is_pair, other=0.0)[None, :]
    sin_1P = tl.load(sin + pair, mask=is_pair, other=0.0)[None, :]
    if INVERSE:
        sin_1P = -sin_1P
    a_HP = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    b_HP = tl.load(x + at + HEAD_DIM // 2, mask=exists, other=0.0).to(tl.float32)
    rotated_HP = a_HP * cos_1P - b_HP * sin_1P
    tl.store(y + at, rotated_HP.to(y.dtype.element_ty), mask=exists)
    rotated_HP = b_HP * cos_1P + a_HP * sin_1P
    tl.store(y + at + HEAD_DIM // 2, rotated_HP.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _rope_kernel(
    q, k, v, cos, sin, q_to, k_to, v_to, q_stride, k_stride, v_stride, angles, heads, groups,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """One program takes HEADS heads of one token: first queries, then keys, then values.

    angles: rows of cos and sin; a token's row is its index modulo them. Results are dense.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    of_queries, of_keys = tl.cdiv(heads, HEADS), tl.cdiv(groups, HEADS)
    angle = (token % angles) * (HEAD_DIM // 2)
    if block < of_queries:
        _rotate_heads(
            q + token * q_stride, q_to + token * heads * HEAD_DIM, cos + angle, sin + angle,
            block * HEADS, heads, HEAD_DIM, HEADS, P, INVERSE,
        )  # fmt: skip
    elif block < of_queries + of_keys:
        _rotate_heads(
            k + token * k_stride, k_to + token * groups * HEAD_DIM, cos + angle, sin + angle,
            (block - of_queries) * HEADS, groups, HEAD_DIM, HEADS, P, INVERSE,
        )  # fmt: skip
    else:
        first = (block - of_queries - of_keys) * HEADS
        _copy_heads(
            v + token * v_stride, v_to + token * groups * HEAD_DIM, first, groups,
            HEAD_DIM, HEADS, P,
        )  # fmt: skip


@torch.library.custom_op("megatron_ring::rope_and_pack", mutates_args=())
def rope_and_pack(
    q_BlHD: torch.Tensor,
    k_BlGD: torch.Tensor,
    v_BlGD: torch.Tensor,
    cos_lP: torch.Tensor,
    sin_lP: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotated queries, and in one tensor kv_2BlGD the rotated keys and the values."""
    rotated_BlHD = q_BlHD.new_empty(q_BlHD.shape)
    kv_2BlGD = k_BlGD.new_empty((2, *k_BlGD.shape))
    _launch((q_BlHD, k_BlGD, v_BlGD), cos_lP, sin_lP, (rotated_BlHD, *kv_2BlGD), inverse=False)
    return rotated_BlHD, kv_2BlGD


@torch.library.custom_op("megatron_ring::rope_backward", mutates_args=())
def rope_backward(
    dq_BlHD: torch.Tensor, dk_BlGD: torch.Tensor, cos_lP: torch.Tensor, sin_lP: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the gradients of rotated queries and keys back."""
    results = tuple(x.new_empty(x.shape) for x in (dq_BlHD, dk_BlGD))
    _launch((dq_BlHD, dk_BlGD), cos_lP, sin_lP, results, inverse=True)
    return results


@rope_and_pack.register_fake
def _(q_BlHD, k_BlGD, v_BlGD, cos_lP, sin_lP):
    return q_BlHD.new_empty(q_BlHD.shape), k_BlGD.new_empty((2, *k_BlGD.shape))


@rope_backward.register_fake
def _(dq_BlHD, dk_BlGD, cos_lP, sin_lP):
    return dq_BlHD.new_empty(dq_BlHD.shape), dk_BlGD.new_empty(dk_BlGD.shape)


def _launch(
    inputs: tuple[torch.Tensor, ...],
    cos_lP: torch.Tensor,
    sin_lP: torch.Tensor,
    results: tuple[torch.Tensor, ...],
    inverse: bool,
) -> None:
    """Rotate q and k from ``inputs`` to ``results``, and copy v where it is among them."""
    heads, head_dim = inputs[0].shape[-2:]
    groups = inputs[1].shape[-2]
    rows = [as_rows(x.flatten(-2)) for x in inputs]
    q, k, v = rows if len(rows) == 3 else (*rows, rows[1])
    q_to, k_to, v_to = results if len(results) == 3 else (*results, results[1])
    pairs = triton.next_power_of_2(head_dim // 2)
    most_heads = max(1, MOST_PAIRS // pairs)
    heads_of_program = min(triton.next_power_of_2(max(heads, groups)), most_heads)
    blocks = [triton.cdiv(x.shape[-2], heads_of_program) for x in inputs]
    if not len(q):
        return
    _rope_kernel[len(q), sum(blocks)](
        q, k, v, *(x.contiguous() for x in (cos_lP, sin_lP)), q_to, k_to, v_to,
        q.stride(0), k.stride(0), v.stride(0), cos_lP.shape[:-1].numel(), heads, groups,
        HEAD_DIM=head_dim, HEADS=heads_of_program, P=pairs, INVERSE=inverse,
        num_warps=warps_for(2 * heads_of_program * pairs),
    )  # fmt: skip


class RopeAndPack(torch.autograd.Function):
    """(q, k, v, cos, sin) -> rotated q and k, and v; k and v are the halves of one tensor."""

    @staticmethod
    def forward(ctx, q_BlHD, k_BlGD, v_BlGD, cos_lP, sin_lP):
        ctx.save_for_backward(cos_lP, sin_lP)
        rotated_BlHD, kv_2BlGD = rope_and_pack(q_BlHD, k_BlGD, v_BlGD, cos_lP, sin_lP)
        return rotated_BlHD, *kv_2BlGD.unbind()

    @staticmethod
    def backward(ctx, dq_BlHD, dk_BlGD, dv_BlGD):
        return *rope_backward(dq_BlHD, dk_BlGD, *ctx.saved_tensors), dv_BlGD, None, None
