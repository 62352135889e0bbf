"""How a model is computed, which changes none of its numbers: split over tensor ranks, in pieces, some of it twice."""

from dataclasses import dataclass
from typing import Literal

from megatron_ring.config import Config
from megatron_ring.parallel.tensor_exchange import ALONE, TensorParallel


@dataclass(frozen=True)
class Execution:
    """tensor: the ranks that layers are split over. The rest is MemoryConfig's, by the same names."""

    tensor: TensorParallel = ALONE
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_attention: bool = False
    mlp_chunks: int = 1
    loss_chunk_size: int = 0
    offload_activations: bool = False

    @staticmethod
    def of(config: Config, tensor: TensorParallel) -> "Execution":
        """What ``config`` asks for, on these tensor ranks."""
        memory = config.memory
        return Execution(
            tensor=tensor,
            recompute=memory.recompute,
            recompute_attention=memory.recompute_attention,
            mlp_chunks=memory.mlp_chunks,
            loss_chunk_size=memory.loss_chunk_size,
            offload_activations=memory.offload_activations,
        )


PLAIN = Execution()
"""One process, everything at once, everything kept."""
