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
    return torch.zeros_like(like, dtype=accumulation_dtype(like.dtype), memory_format=torch.contiguous_format)


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

    Rounding all of its elements is not good enough: where those of dout are equal, they are rounded
    alike, and the errors add up over the head. So the output is 0 but for two elements. Where dout
    is largest it is delta / dout, and where dout is second largest it makes up for the rounding of
    the first, which leaves 2^-17 of delta in bfloat16. In a row with a single element that is not 0
    in dout, delta is rounded once, and a row of zeros gets zeros.

    An element may be as large as all elements of the original output together. This could overflow
    in float16, so there all other elements carry their part of delta.
    """
    dout_BLHD = dout_BLHD.contiguous()
    first, second = _two_largest(dout_BLHD)
    out_BLHD, rest_BLH1 = torch.zeros_like(dout_BLHD), delta_BHL.transpose(1, 2).unsqueeze(-1)
    if dout_BLHD.dtype == torch.float16:
        out_BLHD = _along(dout_BLHD, rest_BLH1).scatter_(-1, torch.cat([first, second], -1), 0.0)
        rest_BLH1 = rest_BLH1 - delta(out_BLHD, dout_BLHD).transpose(1, 2).unsqueeze(-1)
    at_first_BLH1, rest_BLH1 = _share(rest_BLH1, dout_BLHD.gather(-1, first))
    at_second_BLH1, _ = _share(rest_BLH1, dout_BLHD.gather(-1, second))
    # In this order, because in heads of a single element both are the same.
    return out_BLHD.scatter_(-1, second, at_second_BLH1).scatter_(-1, first, at_first_BLH1)


def _along(dout_BLHD: torch.Tensor, delta_BLH1: torch.Tensor) -> torch.Tensor:
    """The multiple of dout with this delta, the shortest of all outputs with it, rounded."""
    norm_BLH1 = torch.linalg.vector_norm(dout_BLHD, dim=-1, keepdim=True, dtype=delta_BLH1.dtype)
    factor_BLH1 = (delta_BLH1 / norm_BLH1.square()).masked_fill_(norm_BLH1 == 0, 0.0)
    return (dout_BLHD * factor_BLH1).to(dout_BLHD.dtype)


def _share(delta_BLH1: torch.Tensor, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One element of an output, in the type of dout, and what its rounding leaves of delta."""
    wide_BLH1 = dout.to(delta_BLH1.dtype)
    exact_BLH1 = (delta_BLH1 / wide_BLH1).masked_fill_(wide_BLH1 == 0, 0.0)
    rounded_BLH1 = exact_BLH1.to(dout.dtype)
    return rounded_BLH1, delta_BLH1 - rounded_BLH1 * wide_BLH1


def _two_largest(x_BLHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The int64 indices in the last dim of two elements of each row, the largest by leading bits.

    On a CPU torch.topk takes longer than the rest of ``output_with``. The bits of a number without
    its sign are ordered as its magnitude is. The lowest of the leading 15 bits are replaced by the
    index, so that one maximum finds both; elements whose other bits agree (within a factor of 4 in
    bfloat16 with heads of 256) count as equally large.
    """
    size, halves = x_BLHD.shape[-1], x_BLHD.itemsize // 2
    index_bits = (1 << (size - 1).bit_length()) - 1
    leading_BLHD = x_BLHD.view(torch.int16)[..., halves - 1 :: halves]  # little-endian
    key_BLHD = leading_BLHD & (torch.iinfo(torch.int16).max & ~index_bits)
    key_BLHD |= torch.arange(size, dtype=torch.int16, device=x_BLHD.device)
    first_BLH1 = (key_BLHD.amax(-1, keepdim=True) & index_bits).long()
    key_BLHD.scatter_(-1, first_BLH1, 0)
    return first_BLH1, (key_BLHD.amax(-1, keepdim=True) & index_bits).long()
