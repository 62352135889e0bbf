"""The running softmax of a ring: output and log-sum-exp in float32, merged block by block, cast once at the end.

Blockwise parallel attention (Liu and Abbeel 2023, section 3; Milakov and Gimelshein 2018, online softmax). The merge
never exponentiates a raw log-sum-exp: the weight of a new block is sigmoid(lse_block - lse).
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RunningSoftmax:
    """What the queries have seen so far, updated in place.

    out_BLHD: (batch, queries, heads, head size), float32, or float64 for float64 inputs; 0 where nothing was seen.
    lse_BHL: (batch, heads, queries), natural log, same dtype; -inf where nothing was seen.
    """

    out_BLHD: torch.Tensor
    lse_BHL: torch.Tensor

    @staticmethod
    def empty(q_BLHD: torch.Tensor) -> "RunningSoftmax":
        batch, length, heads, _ = q_BLHD.shape
        dtype = accumulation_dtype(q_BLHD.dtype)
        return RunningSoftmax(
            torch.zeros(q_BLHD.shape, dtype=dtype, device=q_BLHD.device),
            torch.full((batch, heads, length), -torch.inf, dtype=dtype, device=q_BLHD.device),
        )

    def merge(self, queries: slice, out_BLHD: torch.Tensor, lse_BHL: torch.Tensor) -> None:
        """Take in what ``queries`` see in one more block of keys: its normalised output and its log-sum-exp."""
        old_BHL = self.lse_BHL[:, :, queries]
        # A row that sees nothing here weighs nothing; unclamped it would weigh nan where it had seen nothing before.
        weight_BHL = torch.sigmoid(lse_BHL - old_BHL.clamp(min=torch.finfo(old_BHL.dtype).min))
        old_BLHD = self.out_BLHD[:, queries]
        old_BLHD.lerp_(out_BLHD.to(old_BLHD.dtype), weight_BHL.transpose(1, 2).unsqueeze(-1))
        torch.logaddexp(old_BHL, lse_BHL, out=old_BHL)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over blocks are kept in: float32 for everything but float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def zero_sums(like: torch.Tensor) -> torch.Tensor:
    """Contiguous zeros, in which to add up gradients of ``like`` over blocks."""
    return torch.zeros_like(
        like, dtype=accumulation_dtype(like.dtype), memory_format=torch.contiguous_format
    )


def delta(out_BLHD: torch.Tensor, dout_BLHD: torch.Tensor) -> torch.Tensor:
    """delta_BHL, all that the gradient of attention needs of its output: the product with dout, summed over a head.

    A score's gradient is p * (dp - delta) (Dao et al. 2022, FlashAttention, appendix B.2). That of lse by a score is p,
    so a gradient of lse is taken off delta.
    """
    return (dout_BLHD.to(accumulation_dtype(dout_BLHD.dtype)) * out_BLHD).sum(-1).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class KnownDelta:
    """What a kernel's ``backward`` gets in place of an output of which only delta is known.

    Kernels that take delta read ``delta_BHL`` (by ``delta_of``). Those whose operators compute it
    from an output get one that has this delta (by ``output_of``).
    """

    delta_BHL: torch.Tensor
    dout_BLHD: torch.Tensor

    @functools.cached_property
    def output_BLHD(self) -> torch.Tensor:
        """An output with this delta; computed once."""
        return output_with(self.delta_BHL, self.dout_BLHD)


Output = torch.Tensor | KnownDelta


def delta_of(out: Output, dout_BLHD: torch.Tensor) -> torch.Tensor:
    """delta_BHL of an output, or the known one."""
    return out.delta_BHL if isinstance(out, KnownDelta) else delta(out, dout_BLHD)


def output_of(out: Output) -> torch.Tensor:
    """out_BLHD, or one that has the known delta."""
    return out.output_BLHD if isinstance(out, KnownDelta) else out


def heads_of(out: Output, heads: slice) -> Output:
    """Some heads of an output, or of what stands in for one."""
    if isinstance(out, KnownDelta):
        return KnownDelta(out.delta_BHL[:, heads], out.dout_BLHD[:, :, heads])
    return out[:, :, heads]


def output_with(delta_BHL: torch.Tensor, dout_BLHD: torch.Tensor) -> torch.Tensor:
    """An output in the type of dout that has this delta; contiguous.

    In types of two bytes, rounding all of its elements is not good enough: where those of dout are
    equal, they are rounded alike, and the errors add up over the head. So the output is 0 but for
    two elements. Where dout is largest it is delta / dout, and where dout is second largest it
    makes up for the rounding of the first, which leaves 2^-17 of delta in bfloat16. In a row with a
    single element that is not 0 in dout, delta is rounded once, and a row of zeros gets zeros.

    An element may be as large as all elements of the original output together. This could overflow
    in float16, so there all other elements carry their part of delta.
    """
    rest_BLH1, size = delta_BHL.transpose(1, 2).unsqueeze(-1), dout_BLHD.shape[-1]
    if dout_BLHD.itemsize > 2 or size == 1:
        return _along(dout_BLHD.contiguous(), rest_BLH1)
    dout_BLHD = dout_BLHD.contiguous()
    first, second = _two_largest(dout_BLHD)
    if dout_BLHD.dtype == torch.float16:
        out_BLHD = _along(dout_BLHD, rest_BLH1)
        out_BLHD.view(-1).index_fill_(0, first, 0.0).index_fill_(0, second, 0.0)
        rest_BLH1 = rest_BLH1 - delta(out_BLHD, dout_BLHD).transpose(1, 2).unsqueeze(-1)
    else:
        out_BLHD = torch.zeros_like(dout_BLHD)
    rest, out, dout = rest_BLH1.flatten(), out_BLHD.view(-1), dout_BLHD.view(-1)
    for at in (first, second):
        element, rest = _share(rest, dout.index_select(0, at))
        out.index_copy_(0, at, element)
    return out_BLHD


def _along(dout_BLHD: torch.Tensor, delta_BLH1: torch.Tensor) -> torch.Tensor:
    """The multiple of dout with this delta, the shortest of all outputs with it, rounded."""
    norm_BLH1 = torch.linalg.vector_norm(dout_BLHD, dim=-1, keepdim=True, dtype=delta_BLH1.dtype)
    factor_BLH1 = (delta_BLH1 / norm_BLH1 / norm_BLH1).masked_fill_(norm_BLH1 == 0, 0.0)
    return (dout_BLHD * factor_BLH1).to(dout_BLHD.dtype)


def _share(delta: torch.Tensor, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An output's element of each row, in the type of dout, and what its rounding leaves of delta."""
    wide = dout.to(delta.dtype)
    element = (delta / wide).masked_fill_(wide == 0, 0.0).to(dout.dtype)
    return element, delta - element * wide


def _two_largest(x_BLHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where two elements of each row are, the largest by their leading bits; x is of two bytes.

    Returns int64 indices into the flattened, contiguous ``x``, one of each row. On a CPU torch.topk
    takes ten times as long. The bits of a number without its sign are ordered as its magnitude is.
    The lowest bits are replaced by the index in the row, so that one maximum finds both; elements
    whose other bits agree (within a factor of 4 in bfloat16 with heads of 256) count as equally
    large.
    """
    size = x_BLHD.shape[-1]
    index_bits = (1 << (size - 1).bit_length()) - 1
    key = x_BLHD.view(torch.int16) & (torch.iinfo(torch.int16).max & ~index_bits)
    key |= torch.arange(size, dtype=torch.int16, device=x_BLHD.device)
    key = key.view(-1, size)
    starts = torch.arange(0, x_BLHD.numel(), size, device=x_BLHD.device)
    first = starts + (key.amax(-1) & index_bits)
    key.view(-1).index_fill_(0, first, 0)
    return first, starts + (key.amax(-1) & index_bits)
