"""The feed-forward of a block: E -> F -> E for every token by itself, gated (Llama) or plain (GPT-2)."""

import torch
from torch import nn

from megatron_ring.config import ModelConfig
from megatron_ring.kernels.activation import gelu
from megatron_ring.model.execution import PLAIN, Execution
from megatron_ring.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from megatron_ring.parallel.tensor_exchange import to_tensor_region


class SwigluMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, equation 6), with Hugging Face Llama's names."""

    def __init__(self, config: ModelConfig, execution: Execution = PLAIN):
        super().__init__()
        self.execution, tensor = execution, execution.tensor
        self.swiglu = execution.operations.swiglu
        hidden, feed_forward, bias = (
            config.hidden_size,
            config.feed_forward_size,
            config.add_bias_linear,
        )
        self.gate_proj = ColumnParallelLinear(hidden, feed_forward, bias, tensor)
        self.up_proj = ColumnParallelLinear(hidden, feed_forward, bias, tensor)
        self.down_proj = RowParallelLinear(feed_forward, hidden, bias, tensor)

    def forward(self, x_BmE: torch.Tensor) -> torch.Tensor:
        """(B, m, E) -> (B, m, E)."""
        kept = self.execution.kept_for_feed_forward(x_BmE)
        x_BlE = to_tensor_region(x_BmE, self.execution.tensor)
        return self.down_proj(self.swiglu(self.gate_proj(x_BlE, kept), self.up_proj(x_BlE, kept)))


class GeluMLP(nn.Module):
    """down(gelu(up(x))) (Radford et al. 2019, GPT-2)."""

    def __init__(self, config: ModelConfig, execution: Execution = PLAIN):
        super().__init__()
        self.execution, tensor = execution, execution.tensor
        hidden, feed_forward, bias = (
            config.hidden_size,
            config.feed_forward_size,
            config.add_bias_linear,
        )
        self.up_proj = ColumnParallelLinear(hidden, feed_forward, bias, tensor)
        self.down_proj = RowParallelLinear(feed_forward, hidden, bias, tensor)

    def forward(self, x_BmE: torch.Tensor) -> torch.Tensor:
        """(B, m, E) -> (B, m, E)."""
        kept = self.execution.kept_for_feed_forward(x_BmE)
        return self.down_proj(
            gelu(self.up_proj(to_tensor_region(x_BmE, self.execution.tensor), kept))
        )


_MLPS: dict[str, type[nn.Module]] = {"swiglu": SwigluMLP, "gelu": GeluMLP}


def mlp(config: ModelConfig, execution: Execution = PLAIN) -> nn.Module:
    """The feed-forward that ``config.activation`` names."""
    return _MLPS[config.activation](config, execution)
