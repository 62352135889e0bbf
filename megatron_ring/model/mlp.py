"""The feed-forward of a block: E -> F -> E for each token, gated (Llama) or plain (GPT-2)."""

import torch
from torch import nn

from megatron_ring.config import ModelConfig
from megatron_ring.kernels.activation import gelu
from megatron_ring.kernels.fused.operations import TORCH, Operations
from megatron_ring.model.recompute import shared_input
from megatron_ring.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from megatron_ring.parallel.tensor_exchange import ALONE, TensorParallel, to_tensor_region


class SwigluMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, equation 6), with Hugging Face Llama's names."""

    def __init__(
        self,
        config: ModelConfig,
        tensor: TensorParallel = ALONE,
        operations: Operations = TORCH,
        recomputed: bool = False,
    ):
        super().__init__()
        self.tensor = tensor
        self.swiglu = operations.swiglu
        self.recomputed = recomputed
        self.sums_in_products = operations.sums_in_products
        hidden = config.hidden_size
        width = config.feed_forward_size
        bias = config.add_bias_linear
        self.gate_proj = ColumnParallelLinear(hidden, width, bias, tensor)
        self.up_proj = ColumnParallelLinear(hidden, width, bias, tensor)
        self.down_proj = RowParallelLinear(width, hidden, bias, tensor)

    def forward(self, x_BmE: torch.Tensor) -> torch.Tensor:
        """(B, m, E) -> (B, m, E)."""
        shared = shared_input(x_BmE, self.tensor, self.recomputed, self.sums_in_products)
        x_BlE = to_tensor_region(x_BmE, self.tensor)
        return self.down_proj(
            self.swiglu(self.gate_proj(x_BlE, shared), self.up_proj(x_BlE, shared))
        )


class GeluMLP(nn.Module):
    """down(gelu(up(x))) (Radford et al. 2019, GPT-2)."""

    def __init__(
        self,
        config: ModelConfig,
        tensor: TensorParallel = ALONE,
        operations: Operations = TORCH,
        recomputed: bool = False,
    ):
        super().__init__()
        self.tensor = tensor
        self.recomputed = recomputed
        self.sums_in_products = operations.sums_in_products
        hidden = config.hidden_size
        width = config.feed_forward_size
        bias = config.add_bias_linear
        self.up_proj = ColumnParallelLinear(hidden, width, bias, tensor)
        self.down_proj = RowParallelLinear(width, hidden, bias, tensor)

    def forward(self, x_BmE: torch.Tensor) -> torch.Tensor:
        """(B, m, E) -> (B, m, E)."""
        shared = shared_input(x_BmE, self.tensor, self.recomputed, self.sums_in_products)
        x_BlE = to_tensor_region(x_BmE, self.tensor)
        return self.down_proj(gelu(self.up_proj(x_BlE, shared)))


_MLPS: dict[str, type[nn.Module]] = {"swiglu": SwigluMLP, "gelu": GeluMLP}


def mlp(
    config: ModelConfig,
    tensor: TensorParallel = ALONE,
    operations: Operations = TORCH,
    recomputed: bool = False,
) -> nn.Module:
    """Return the feed-forward of ``config.activation``; ``recomputed``: backward runs it again."""
    return _MLPS[config.activation](config, tensor, operations, recomputed)
