"""How a model is computed, which changes its numbers by rounding at most: split over tensor ranks, in pieces, some of
it twice, by which library."""

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_ring.config import Config
from megatron_ring.kernels.fused.operations import TORCH, Operations
from megatron_ring.parallel.tensor_exchange import ALONE, ShardKept, TensorParallel


@dataclass(frozen=True)
class Execution:
    """tensor: the ranks that layers are split over. operations: who computes what. The rest is MemoryConfig's, by the
    same names."""

    tensor: TensorParallel = ALONE
    operations: Operations = TORCH
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_attention: bool = False
    mlp_chunks: int = 1
    loss_chunk_size: int = 0
    offload_activations: bool = False

    @staticmethod
    def of(config: Config, tensor: TensorParallel, operations: Operations = TORCH) -> "Execution":
        """What ``config`` asks for, on these tensor ranks, by ``operations``."""
        memory = config.memory
        return Execution(
            tensor=tensor,
            operations=operations,
            recompute=memory.recompute,
            recompute_attention=memory.recompute_attention,
            mlp_chunks=memory.mlp_chunks,
            loss_chunk_size=memory.loss_chunk_size,
            offload_activations=memory.offload_activations,
        )

    def kept_for_attention(self, x_BmE: torch.Tensor) -> ShardKept | None:
        """What backward keeps of the gathered input of attention's projections; None: all of it."""
        return self._kept(x_BmE, computed_again=False)

    def kept_for_feed_forward(self, x_BmE: torch.Tensor) -> ShardKept | None:
        """What backward keeps of the gathered input of the feed-forward's first matrices."""
        return self._kept(x_BmE, computed_again=self.mlp_chunks > 1)

    def _kept(self, x_BmE: torch.Tensor, computed_again: bool) -> ShardKept | None:
        """A region that backward computes again has its input gathered just before it is needed.

        Nothing of it is kept from forward to backward then, and a second all-gather would be waste.
        """
        if not self.tensor.sequence_parallel or computed_again or self.recompute != "none":
            return None
        return ShardKept(x_BmE, self.tensor)


PLAIN = Execution()
"""One process, everything at once, everything kept."""
