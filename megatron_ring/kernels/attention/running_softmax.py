"""The running softmax of a ring: output and log-sum-exp in float32, merged block by block.

They are cast once, at the end. Blockwise parallel attention (Liu and Abbeel 2023, section 3;
Milakov and Gimelshein 2018, online softmax). The merge never exponentiates a raw log-sum-exp: the
weight of a new block is sigmoid(lse_block - lse).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RunningSoftmax:
    """Attention over the keys that the queries have seen so far, updated in place.

    out_BLHD: (batch, queries, heads, head dim), float32, or float64 for float64 inputs; 0 where
        nothing was seen.
    lse_BHL: (batch, heads, queries), natural log, same dtype; -inf where nothing was seen.
    """

    out_BLHD: torch.Tensor
    lse_BHL: torch.Tensor

    @staticmethod
    def empty(q_BLHD: torch.Tensor) -> "RunningSoftmax":
        """Create the state of queries that have seen nothing yet."""
        batch, length, heads, _ = q_BLHD.shape
        dtype = accumulation_dtype(q_BLHD.dtype)
        return RunningSoftmax(
            torch.zeros(q_BLHD.shape, dtype=dtype, device=q_BLHD.device),
            torch.full((batch, heads, length), -torch.inf, dtype=dtype, device=q_BLHD.device),
        )

    def merge(self, queries: slice, out_BLHD: torch.Tensor, lse_BHL: torch.Tensor) -> None:
        """Merge the normalised output and log-sum-exp of ``queries`` over another block of keys."""
        old_BHL = self.lse_BHL[:, :, queries]
        # A row that sees nothing in this block has weight 0. Without the clamp its weight would be
        # nan if it had not seen anything before either.
        weight_BHL = torch.sigmoid(lse_BHL - old_BHL.clamp(min=torch.finfo(old_BHL.dtype).min))
        old_BLHD = self.out_BLHD[:, queries]
        old_BLHD.lerp_(out_BLHD.to(old_BLHD.dtype), weight_BHL.transpose(1, 2).unsqueeze(-1))
        torch.logaddexp(old_BHL, lse_BHL, out=old_BHL)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over blocks: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def zero_accumulators(like: torch.Tensor) -> torch.Tensor:
    """Allocate contiguous zeros in which to accumulate gradients of ``like`` over blocks."""
    return torch.zeros_like(
        like, dtype=accumulation_dtype(like.dtype), memory_format=torch.contiguous_format
    )


def delta(out_BLHD: torch.Tensor, dout_BLHD: torch.Tensor) -> torch.Tensor:
    """Sum out * dout over each head: delta_BHL.

    The gradient of attention uses its output only through delta: the gradient of a score is
    p * (dp - delta) (Dao et al. 2022, FlashAttention, appendix B.2). The derivative of lse by a
    score is p, so a gradient of lse is subtracted from delta.
    """
    return (dout_BLHD.to(accumulation_dtype(dout_BLHD.dtype)) * out_BLHD).sum(-1).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class KnownDelta:
    """The argument of a kernel's ``backward`` in place of an output of which only delta is known.

    Kernels that need only delta read ``delta_BHL`` through ``delta_of``. Kernels whose operators
    compute delta from an output get one with this delta through ``output_of``.
    """

    delta_BHL: torch.Tensor
    dout_BLHD: torch.Tensor

    @functools.cached_property
    def output_BLHD(self) -> torch.Tensor:
        """An output with this delta; computed once."""
        return output_from_delta(self.delta_BHL, self.dout_BLHD)


@dataclass(frozen=True, eq=False)
class FinalOutput:
    """An output merged over all hops, whose delta is computed once for the kernels that need it."""

    output_BLHD: torch.Tensor
    compute_delta: Callable[[], torch.Tensor]

    @staticmethod
    def of(out_BLHD: torch.Tensor, dout_BLHD: torch.Tensor) -> "FinalOutput":
        """Combine an output with its gradient."""
        return FinalOutput(out_BLHD, lambda: delta(out_BLHD, dout_BLHD).contiguous())

    @functools.cached_property
    def delta_BHL(self) -> torch.Tensor:
        """As of ``delta``; computed once."""
        return self.compute_delta()


Output = torch.Tensor | FinalOutput | KnownDelta


def delta_of(out: Output, dout_BLHD: torch.Tensor) -> torch.Tensor:
    """Return delta_BHL, computed from an output or known."""
    return delta(out, dout_BLHD) if isinstance(out, torch.Tensor) else out.delta_BHL


def output_of(out: Output) -> torch.Tensor:
    """Return out_BLHD, or an output with the known delta."""
    return out if isinstance(out, torch.Tensor) else out.output_BLHD


def slice_heads(out: Output, heads: slice) -> Output:
    """Return some heads of an output or of a known delta."""
    if isinstance(out, KnownDelta):
        return KnownDelta(out.delta_BHL[:, heads], out.dout_BLHD[:, :, heads])
    if isinstance(out, FinalOutput):
        return FinalOutput(out.output_BLHD[:, :, heads], lambda: out.delta_BHL[:, heads])
    return out[:, :, heads]


def output_from_delta(delta_BHL: torch.Tensor, dout_BLHD: torch.Tensor) -> torch.Tensor:
    """Construct a contiguous output with this delta, in the dtype of dout.

    In float32 and float64 it is a multiple of dout. In 2-byte dtypes that would not be accurate
    enough: where elements of dout are equal, their rounding errors are equal and add up over the
    head. So the output is 0 except for two elements. Where dout is largest it is delta / dout, and
    where dout is second largest it compensates the rounding of the first, which leaves an error of
    2^-17 of delta in bfloat16. In a row with a single non-zero element of dout, delta is rounded
    once, and a row of zeros gets zeros.

    One element may be as large as all elements of the original output together. This could overflow
    in float16, so there all other elements carry their part of delta.
    """
    rest_BLH1 = delta_BHL.transpose(1, 2).unsqueeze(-1)
    head_dim = dout_BLHD.shape[-1]
    if dout_BLHD.itemsize > 2 or head_dim == 1:
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
    for index in (first, second):
        element, rest = _element_for(rest, dout.index_select(0, index))
        out.index_copy_(0, index, element)
    return out_BLHD


def _along(dout_BLHD: torch.Tensor, delta_BLH1: torch.Tensor) -> torch.Tensor:
    """Return the rounded multiple of dout with this delta: the output of smallest norm."""
    norm_BLH1 = torch.linalg.vector_norm(dout_BLHD, dim=-1, keepdim=True, dtype=delta_BLH1.dtype)
    factor_BLH1 = (delta_BLH1 / norm_BLH1 / norm_BLH1).masked_fill_(norm_BLH1 == 0, 0.0)
    return (dout_BLHD * factor_BLH1).to(dout_BLHD.dtype)


def _element_for(delta: torch.Tensor, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's element that yields delta, in dout's dtype, and its rounding error."""
    wide = dout.to(delta.dtype)
    element = (delta / wide).masked_fill_(wide == 0, 0.0).to(dout.dtype)
    return element, delta - element * wide


def _two_largest(x_BLHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the two largest elements of each row, by their leading bits; x has a 2-byte dtype.

    Returns int64 indices into the flattened, contiguous ``x``, one per row. On a CPU torch.topk
    takes ten times as long. Without the sign, the bits of a number have the same order as its
    magnitude. The lowest bits are replaced by the index in the row, so that one maximum finds both;
    elements whose other bits are equal (within a factor of 4 in bfloat16 with a head dim of 256)
    count as equally large.
    """
    head_dim = x_BLHD.shape[-1]
    index_bits = (1 << (head_dim - 1).bit_length()) - 1
    key = x_BLHD.view(torch.int16) & (torch.iinfo(torch.int16).max & ~index_bits)
    key |= torch.arange(head_dim, dtype=torch.int16, device=x_BLHD.device)
    key = key.view(-1, head_dim)
    starts = torch.arange(0, x_BLHD.numel(), head_dim, device=x_BLHD.device)
    first = starts + (key.amax(-1) & index_bits)
    key.view(-1).index_fill_(0, first, 0)
    return first, starts + (key.amax(-1) & index_bits)
