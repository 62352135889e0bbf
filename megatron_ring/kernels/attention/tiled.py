"""The hop of a kernel that attends rectangles and triangles: tile after tile, merged by the log-sum-exp.

An ``Operator`` is one library's attention of one tile. What it answers for a tile is merged into the running softmax,
and its gradients are added up in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_ring.kernels.attention.runs import KeyRanges
from megatron_ring.kernels.attention.state import Output, RunningSoftmax, output_of
from megatron_ring.kernels.attention.tiles import Tile, TileKind, Tiling


class Operator(Protocol):
    """Attention of one tile. Shapes as in HopKernel, of this tile's queries (L) and keys (M).

    causal: query i sees the keys up to i, of as many. bias_LM: added to the scores, 0 or -inf, in the type of q.
    """

    def forward(
        self, q_BLHD, k_BMGD, v_BMGD, causal: bool, bias_LM: torch.Tensor | None, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out_BLHD and lse_BHL; what lse is where a row sees nothing does not matter."""

    def backward(
        self,
        dout_BLHD,
        q_BLHD,
        k_BMGD,
        v_BMGD,
        out_BLHD,
        lse_BHL,
        causal: bool,
        bias_LM,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq_BLHD, dk_BMGD, dv_BMGD from the final, merged ``out`` and ``lse``."""


@dataclass(frozen=True)
class Tiled:
    """A HopKernel of operators. takes: the operator for a tile, None for a tile that something else sees to."""

    tiling: Tiling
    takes: Callable[[Tile], Operator | None]

    def forward(
        self,
        q_BLHD: torch.Tensor,
        k_BLGD: torch.Tensor,
        v_BLGD: torch.Tensor,
        runs: KeyRanges,
        scale: float,
        state: RunningSoftmax,
    ) -> None:
        """Let the queries see their runs of this block of keys; ``state`` is updated in place."""
        for tile in runs.tiles(self.tiling):
            if (operator := self.takes(tile)) is None:
                continue
            bias, blind_rows = _bias(runs, tile, q_BLHD)
            q, k, v = q_BLHD[:, tile.queries], k_BLGD[:, tile.keys], v_BLGD[:, tile.keys]
            out, lse = operator.forward(q, k, v, tile.kind is TileKind.CAUSAL, bias, scale)
            if (
                blind_rows is not None
            ):  # torch's operators answer 0, not -inf, for a row that sees nothing
                lse = lse.masked_fill(blind_rows, -torch.inf)
            state.merge(tile.queries, out, lse)

    def backward(
        self,
        dout_BLHD: torch.Tensor,
        q_BLHD: torch.Tensor,
        k_BLGD: torch.Tensor,
        v_BLGD: torch.Tensor,
        out: Output,
        lse_BHL: torch.Tensor,
        runs: KeyRanges,
        scale: float,
        dq_BLHD: torch.Tensor,
        dk_BLGD: torch.Tensor,
        dv_BLGD: torch.Tensor,
    ) -> None:
        """Add this block's share to ``dq``, ``dk``, ``dv``. ``out`` and ``lse`` are the final, merged ones."""
        for tile in runs.tiles(self.tiling):
            if (operator := self.takes(tile)) is None:
                continue
            rows, keys, out_BLHD = tile.queries, tile.keys, output_of(out)
            dq, dk, dv = operator.backward(
                dout_BLHD[:, rows], q_BLHD[:, rows], k_BLGD[:, keys], v_BLGD[:, keys], out_BLHD[:, rows],
                lse_BHL[:, :, rows], tile.kind is TileKind.CAUSAL, _bias(runs, tile, q_BLHD)[0], scale,
            )  # fmt: skip
            dq_BLHD[:, rows] += dq
            dk_BLGD[:, keys] += dk
            dv_BLGD[:, keys] += dv


def _bias(
    runs: KeyRanges, tile: Tile, q: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """For a masked tile: 0 where visible and -inf elsewhere, (queries, keys); and which queries see nothing."""
    if tile.kind is not TileKind.MASKED:
        return None, None
    visible = runs.visible(tile, q.device)
    bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(
        ~visible, -torch.inf
    )
    return bias, ~visible.any(-1)
