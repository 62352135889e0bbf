"""A hop kernel that calls a library's operator for each tile, a rectangle or a triangle.

The output of each tile is merged into the running softmax; its gradients are accumulated in
float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_ring.kernels.attention.hop_kernel import GradientAccumulators, HopInputs
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.running_softmax import Output, RunningSoftmax, output_of
from megatron_ring.kernels.attention.tiles import Tile, TileKind, Tiling


@dataclass(frozen=True)
class TileOperator:
    """One library's attention of one tile; shapes as in HopInputs, with L queries and M keys.

    forward: (q_BLHD, k_BMGD, v_BMGD, causal, bias_LM, scale) -> (out_BLHD, lse_BHL). ``causal``:
        query i sees keys 0 to i of as many. ``bias_LM`` is added to the scores: 0 or -inf in the
        type of q, None for no mask. The lse of a row that sees nothing is ignored.
    backward: (dout_BLHD, q_BLHD, k_BMGD, v_BMGD, out_BLHD, lse_BHL, causal, bias_LM, scale) ->
        (dq_BLHD, dk_BMGD, dv_BMGD), from the final ``out`` and ``lse``, merged over all hops.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class TiledKernel:
    """A HopKernel that calls an operator for each tile.

    operator_for: the operator for a tile, None for a tile that is computed elsewhere.
    """

    tiling: Tiling
    operator_for: Callable[[Tile], TileOperator | None]

    def forward(self, inputs: HopInputs, state: RunningSoftmax) -> None:
        """As in ``HopKernel``."""
        q_BLHD, k_BLGD, v_BLGD, key_ranges, scale = inputs
        for tile in key_ranges.tiles(self.tiling):
            operator = self.operator_for(tile)
            if operator is None:
                continue
            q = q_BLHD[:, tile.queries]
            k, v = k_BLGD[:, tile.keys], v_BLGD[:, tile.keys]
            bias, masked_rows = _bias(key_ranges, tile, q_BLHD)
            out, lse = operator.forward(q, k, v, tile.kind is TileKind.CAUSAL, bias, scale)
            if masked_rows is not None:
                # torch's operators return 0, not -inf, for a row that sees nothing.
                lse = lse.masked_fill(masked_rows, -torch.inf)
            state.merge(tile.queries, out, lse)

    def backward(
        self,
        inputs: HopInputs,
        dout_BLHD: torch.Tensor,
        out: Output,
        lse_BHL: torch.Tensor,
        accumulators: GradientAccumulators,
    ) -> None:
        """As in ``HopKernel``."""
        q_BLHD, k_BLGD, v_BLGD, key_ranges, scale = inputs
        dq_BLHD, dk_BLGD, dv_BLGD = accumulators
        for tile in key_ranges.tiles(self.tiling):
            operator = self.operator_for(tile)
            if operator is None:
                continue
            rows, keys = tile.queries, tile.keys
            bias, _ = _bias(key_ranges, tile, q_BLHD)
            dq, dk, dv = operator.backward(
                dout_BLHD[:, rows], q_BLHD[:, rows], k_BLGD[:, keys], v_BLGD[:, keys],
                output_of(out)[:, rows], lse_BHL[:, :, rows], tile.kind is TileKind.CAUSAL, bias,
                scale,
            )  # fmt: skip
            dq_BLHD[:, rows] += dq
            dk_BLGD[:, keys] += dk
            dv_BLGD[:, keys] += dv

    def forward_whole(self, inputs: HopInputs) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As in ``WholeKernel``."""
        q_BLHD, k_BLGD, v_BLGD, _, scale = inputs
        tile = self._whole_tile(inputs)
        if tile is None:
            return None
        operator = self.operator_for(tile)
        is_causal = tile.kind is TileKind.CAUSAL
        out_BLHD, lse_BHL = operator.forward(q_BLHD, k_BLGD, v_BLGD, is_causal, None, scale)
        return out_BLHD.contiguous(), lse_BHL.contiguous()

    def backward_whole(
        self, inputs: HopInputs, dout_BLHD: torch.Tensor, out: Output, lse_BHL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """As in ``WholeKernel``."""
        q_BLHD, k_BLGD, v_BLGD, _, scale = inputs
        tile = self._whole_tile(inputs)
        if tile is None:
            return None
        operator = self.operator_for(tile)
        is_causal = tile.kind is TileKind.CAUSAL
        out_BLHD = output_of(out)
        return operator.backward(
            dout_BLHD, q_BLHD, k_BLGD, v_BLGD, out_BLHD, lse_BHL, is_causal, None, scale
        )

    def _whole_tile(self, inputs: HopInputs) -> Tile | None:
        """Return the tile that is the whole hop and needs no mask, None if there is none."""
        tiles = inputs.key_ranges.tiles(self.tiling)
        queries, keys = (slice(0, x.shape[1]) for x in (inputs.q_BLHD, inputs.k_BLGD))
        if len(tiles) != 1 or (tiles[0].queries, tiles[0].keys) != (queries, keys):
            return None
        needs_mask = tiles[0].kind is TileKind.MASKED
        return None if needs_mask or self.operator_for(tiles[0]) is None else tiles[0]


def _bias(
    key_ranges: KeyRanges, tile: Tile, q: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return a masked tile's bias (queries, keys) and its rows that see nothing; else None."""
    if tile.kind is not TileKind.MASKED:
        return None, None
    visible = key_ranges.visible(tile, q.device)
    bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device)
    return bias.masked_fill_(~visible, -torch.inf), ~visible.any(-1)
