"""The running softmax of a ring: output and log-sum-exp in float32, merged block by block, cast once at the end.

Blockwise parallel attention (Liu and Abbeel 2023, section 3; Milakov and Gimelshein 2018, online softmax). The merge
never exponentiates a raw log-sum-exp: the weight of a new block is sigmoid(lse_block - lse).
"""

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


def output_of(delta_BHL: torch.Tensor, dout_BLHD: torch.Tensor) -> torch.Tensor:
    """An output with this delta, for kernels that ask for the output and take only delta from it: along dout."""
    square_BLH1 = torch.linalg.vector_norm(dout_BLHD, dim=-1, keepdim=True, dtype=delta_BHL.dtype).square()
    stretch_BLH1 = delta_BHL.transpose(1, 2).unsqueeze(-1) / square_BLH1
    # Where dout is 0, so is its delta.
    return (dout_BLHD * stretch_BLH1.masked_fill(square_BLH1 == 0, 0.0)).to(dout_BLHD.dtype)
