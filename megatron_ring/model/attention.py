"""The attention layer: project, turn by position, attend, project back. Who attends to whom is another's business.

Queries, keys and values have projections of their own, ``q_proj``, ``k_proj`` and ``v_proj``, rows ordered by head. A
tensor-parallel rank takes a run of rows of each, though keys and values have fewer heads, and a Hugging Face Llama
takes them as they are; a fused matrix would have to be taken apart for both.
"""

from typing import Protocol

import torch
from torch import nn

from megatron_ring.config import ModelConfig
from megatron_ring.kernels.rope import Rotation, rotate


class AttentionFunction(Protocol):
    """Causal attention over the whole sequence, of which this process holds l tokens; scaled by 1 / sqrt(D).

    Query head i reads key-value head i // (H / G). The model neither knows nor asks where the other tokens live.
    """

    def __call__(self, q_BlHD: torch.Tensor, k_BlGD: torch.Tensor, v_BlGD: torch.Tensor) -> torch.Tensor:
        """out_BlHD, in the dtype of ``q_BlHD``."""
        ...


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H query heads over G key-value heads of size D."""

    def __init__(self, config: ModelConfig, attention: AttentionFunction):
        super().__init__()
        self.head_dim = config.head_dim
        self.attention = attention
        hidden, bias = config.hidden_size, config.add_bias_linear
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * config.head_dim, bias)
        self.k_proj = nn.Linear(hidden, config.key_value_heads * config.head_dim, bias)
        self.v_proj = nn.Linear(hidden, config.key_value_heads * config.head_dim, bias)
        self.out_proj = nn.Linear(config.num_attention_heads * config.head_dim, hidden, bias)

    def forward(self, x_BlE: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        """(B, l, E). ``rotation`` is None for a model whose positions come from a table."""
        q_BlHD, k_BlGD, v_BlGD = (self._heads(proj(x_BlE)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if rotation is not None:
            # Before the attention function: keys are turned once, at home, and travel turned.
            q_BlHD, k_BlGD = rotate(q_BlHD, rotation), rotate(k_BlGD, rotation)
        return self.out_proj(self.attention(q_BlHD, k_BlGD, v_BlGD).flatten(-2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))
