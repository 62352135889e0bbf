"""One hop through torch's own fused attention, by those of its operators that return the log-sum-exp.

On a CPU that is the flash kernel of ``scaled_dot_product_attention``. On CUDA whole rectangles and triangles go to the
flash kernel (bf16, fp16) and everything else to the memory-efficient one; that path is written from the operators'
schemas and has not run on a GPU yet. Torch's public function hides the log-sum-exp, without which blocks cannot be
merged, hence ``torch.ops.aten``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_ring.kernels.attention.runs import KeyRuns, Tile, TileKind, Tiling
from megatron_ring.kernels.attention.state import RunningSoftmax

aten = torch.ops.aten

# Shapes in this file: torch's operators take (batch, heads, tokens, head size).
Bias = torch.Tensor | None


@dataclass(frozen=True)
class _Operator:
    """forward(q, k, v, causal, bias, scale) -> (out, lse); backward(dout, q, k, v, out, lse, causal, bias, scale)."""

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _cpu_forward(q, k, v, causal: bool, bias: Bias, scale: float):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)


def _cpu_backward(dout, q, k, v, out, lse, causal: bool, bias: Bias, scale: float):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )


def _cuda_flash_forward(q, k, v, causal: bool, bias: Bias, scale: float):
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]


def _cuda_flash_backward(dout, q, k, v, out, lse, causal: bool, bias: Bias, scale: float):
    # Without dropout the random state is not read, and without packing neither are the cumulative lengths.
    no_lengths, no_random_state = None, torch.empty(2, dtype=torch.uint64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, no_lengths, no_lengths, q.shape[2], k.shape[2],
        0.0, causal, no_random_state, no_random_state, scale=scale,
    )  # fmt: skip


def _cuda_efficient_forward(q, k, v, causal: bool, bias: Bias, scale: float):
    k, v = (_repeated(x, q) for x in (k, v))
    bias = _aligned(bias, q)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)
    return out, lse[:, :, : q.shape[2]]  # this operator pads its lse to whole warps


def _cuda_efficient_backward(dout, q, k, v, out, lse, causal: bool, bias: Bias, scale: float):
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, _repeated(k, q), _repeated(v, q), _aligned(bias, q), out, padded, unused, unused,
        0.0, [True, True, True, False], causal, scale=scale,
    )  # fmt: skip
    return dq, *(d.unflatten(1, (k.shape[1], -1)).sum(2) for d in (dk, dv))


def _repeated(kv: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Key-value heads repeated for their query heads: the efficient operator knows no groups."""
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def _aligned(bias: Bias, q: torch.Tensor) -> Bias:
    """The bias as the efficient operator wants it: one view for all heads, rows that start at multiples of 8."""
    if bias is None:
        return None
    keys = bias.shape[-1]
    padded = torch.nn.functional.pad(bias, (0, -keys % 8))
    return padded[:, :keys].expand(*q.shape[:2], -1, -1)


_CPU = _Operator(_cpu_forward, _cpu_backward)
_CUDA_FLASH = _Operator(_cuda_flash_forward, _cuda_flash_backward)
_CUDA_EFFICIENT = _Operator(_cuda_efficient_forward, _cuda_efficient_backward)

# Measured, docs/log.md: a triangle in tiles of 128 computes 53% of its square, torch's CPU kernel alone up to 62%.
_CPU_TILING = Tiling(rows=128, split_triangles=True)
_CUDA_TILING = Tiling(rows=1024, split_triangles=False)


def forward(
    q_BLHD: torch.Tensor, k_BLGD: torch.Tensor, v_BLGD: torch.Tensor, runs: KeyRuns, scale: float, state: RunningSoftmax
) -> None:
    """Let the queries see their runs of this block of keys; ``state`` is updated in place."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLGD, v_BLGD))
    for tile in runs.tiles(_tiling(q)):
        bias, blind_rows = _bias(runs, tile, q)
        out, lse = _operator(q, tile).forward(
            q[:, :, tile.queries], k[:, :, tile.keys], v[:, :, tile.keys], tile.kind is TileKind.CAUSAL, bias, scale
        )
        if blind_rows is not None:  # these kernels answer 0, not -inf, for a row that sees nothing
            lse = lse.masked_fill(blind_rows, -torch.inf)
        state.merge(tile.queries, out.transpose(1, 2), lse)


def backward(
    dout_BLHD: torch.Tensor,
    q_BLHD: torch.Tensor,
    k_BLGD: torch.Tensor,
    v_BLGD: torch.Tensor,
    out_BLHD: torch.Tensor,
    lse_BHL: torch.Tensor,
    runs: KeyRuns,
    scale: float,
    dq_BLHD: torch.Tensor,
    dk_BLGD: torch.Tensor,
    dv_BLGD: torch.Tensor,
) -> None:
    """Add this block's share to ``dq``, ``dk``, ``dv``. ``out`` and ``lse`` are the final, merged ones."""
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout_BLHD, q_BLHD, k_BLGD, v_BLGD, out_BLHD))
    for tile in runs.tiles(_tiling(q)):
        rows, keys = tile.queries, tile.keys
        dq, dk, dv = _operator(q, tile).backward(
            dout[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse_BHL[:, :, rows],
            tile.kind is TileKind.CAUSAL, _bias(runs, tile, q)[0], scale,
        )  # fmt: skip
        dq_BLHD[:, rows] += dq.transpose(1, 2)
        dk_BLGD[:, keys] += dk.transpose(1, 2)
        dv_BLGD[:, keys] += dv.transpose(1, 2)


def _tiling(q: torch.Tensor) -> Tiling:
    return _CPU_TILING if q.device.type == "cpu" else _CUDA_TILING


def _operator(q: torch.Tensor, tile: Tile) -> _Operator:
    if q.device.type == "cpu":
        return _CPU
    flash = tile.kind is not TileKind.MASKED and q.dtype in (torch.bfloat16, torch.float16)
    return _CUDA_FLASH if flash else _CUDA_EFFICIENT


def _bias(runs: KeyRuns, tile: Tile, q: torch.Tensor) -> tuple[Bias, torch.Tensor | None]:
    """For a masked tile: 0 where visible and -inf elsewhere, (queries, keys); and which queries see nothing."""
    if tile.kind is not TileKind.MASKED:
        return None, None
    visible = runs.visible(tile).to(q.device)
    bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -torch.inf)
    return bias, ~visible.any(-1)
