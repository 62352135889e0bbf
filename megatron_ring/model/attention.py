"""The attention layer: projections, optional norms of heads, RoPE, attention, output projection.

The attention function applies the mask. Queries, keys and values have separate
projections, ``q_proj``, ``k_proj`` and ``v_proj``, with rows ordered by head: a tensor-parallel
rank then takes a contiguous range of rows of each, although there are fewer key-value heads, and
they map one to one to those of a Hugging Face Llama. A fused matrix would have to be split for
both.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from megatron_ring.config import ModelConfig
from megatron_ring.kernels.fused.operations import TORCH, Operations
from megatron_ring.kernels.norm import NormFunction, norm
from megatron_ring.kernels.rope import Rotation
from megatron_ring.model.recompute import shared_input
from megatron_ring.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    mark_local_heads,
    split_parameter,
)
from megatron_ring.parallel.tensor_exchange import ALONE, TensorParallel, to_tensor_region


class AttentionFunction(Protocol):
    """Causal attention over the whole sequence, of which this process holds l tokens.

    Scores are scaled by 1 / sqrt(D). Query head i reads key-value head i // (H / G). A token
    attends to the tokens of its own document up to and including itself, and with a ``window``
    above 0 only the last ``window`` of these. ``document_starts``, int64 (documents,) on the CPU,
    holds the first index of each document when the B whole samples are laid end to end, so that
    sample b begins at b * S; None means that each sample is one document.
    """

    def __call__(
        self,
        q_BlHD: torch.Tensor,
        k_BlGD: torch.Tensor,
        v_BlGD: torch.Tensor,
        window: int,
        document_starts: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out_BlHD, in the dtype of ``q_BlHD``, and lse_BHl of the scores, natural log.

        lse is float32 (float64 for float64), and gradients flow through it as through the output.
        """
        ...


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H query heads, G key-value heads, of size D.

    A tensor-parallel rank has H/T and G/T of them, with their sinks; heads interact only in the
    output projection. H x D need not equal E. ``qk_layernorm`` normalizes every query and key head
    (Dehghani et al. 2023, Scaling Vision Transformers to 22 Billion Parameters, section 2) with
    weights of size D that all heads share, on all tensor ranks. ``recomputed``: backward runs the
    layer again.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionFunction,
        window: int,
        tensor: TensorParallel = ALONE,
        operations: Operations = TORCH,
        recomputed: bool = False,
    ):
        super().__init__()
        self.head_dim = config.head_dim
        self.attention = attention
        self.window = window
        self.tensor = tensor
        self.rotate = operations.rotate
        self.recomputed = recomputed
        self.sums_in_products = operations.sums_in_products
        self.sink_H = _SINKS[config.softmax_type](config.num_attention_heads, tensor)
        hidden = config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        key_values = config.key_value_heads * config.head_dim
        bias = config.add_bias_linear or config.add_qkv_bias
        self.q_proj = ColumnParallelLinear(hidden, queries, bias, tensor)
        self.k_proj = ColumnParallelLinear(hidden, key_values, bias, tensor)
        self.v_proj = ColumnParallelLinear(hidden, key_values, bias, tensor)
        self.q_norm = _head_norm(config, operations.norm)
        self.k_norm = _head_norm(config, operations.norm)
        self.out_proj = RowParallelLinear(queries, hidden, config.add_bias_linear, tensor)

    def forward(
        self, x_BmE: torch.Tensor, rotation: Rotation | None, document_starts: torch.Tensor | None
    ) -> torch.Tensor:
        """Return (B, m, E). ``rotation`` is None for a model with learned positions."""
        shared = shared_input(x_BmE, self.tensor, self.recomputed, self.sums_in_products)
        x_BlE = to_tensor_region(x_BmE, self.tensor)
        q_BlhD = self.q_norm(self._split_heads(self.q_proj(x_BlE, shared)))
        k_BlgD = self.k_norm(self._split_heads(self.k_proj(x_BlE, shared)))
        v_BlgD = self._split_heads(self.v_proj(x_BlE, shared))
        if rotation is not None:
            # Before the attention function, so that keys are rotated once, before the ring sends
            # them.
            q_BlhD, k_BlgD, v_BlgD = self.rotate(q_BlhD, k_BlgD, v_BlgD, rotation)
        out_BlhD, lse_Bhl = self.attention(q_BlhD, k_BlgD, v_BlgD, self.window, document_starts)
        if self.sink_H is not None:
            out_BlhD = with_sink(out_BlhD, lse_Bhl, self.sink_H)
        return self.out_proj(out_BlhD.flatten(-2))

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


def _head_norm(config: ModelConfig, function: NormFunction) -> nn.Module:
    """Return the norm of a head, of the same kind as the model's other norms."""
    if not config.qk_layernorm:
        return nn.Identity()
    head_norm = norm(config.normalization, config.head_dim, config.norm_epsilon, function)
    return mark_local_heads(head_norm)


def with_sink(out_BlHD: torch.Tensor, lse_BHl: torch.Tensor, sink_H: torch.Tensor) -> torch.Tensor:
    """Return the output as if each softmax had one more key, of score ``sink_H``, without a value.

    The result is exact, in the dtype of ``out_BlHD``: the denominator grows from e^lse to e^lse +
    e^sink, so the output is scaled by sigmoid(lse - sink). Attention sinks are from Xiao et al.
    2023 (Efficient Streaming Language Models with Attention Sinks, section 3.3), a learned score
    per head from OpenAI's gpt-oss (2025), a score of 0 from Miller 2023 (Attention Is Off By One).
    """
    # The product is float32 for bfloat16 output, because lse is; only the result is cast.
    factor_BlH1 = torch.sigmoid(lse_BHl - sink_H.unsqueeze(-1)).transpose(1, 2).unsqueeze(-1)
    return (out_BlHD * factor_BlH1).type_as(out_BlHD)


def _zero_sink(heads: int, tensor: TensorParallel) -> torch.Tensor:
    """Return scores of 0: a buffer, to follow the model to its device, and not saved."""
    return nn.Buffer(torch.zeros(len(tensor.part(heads))), persistent=False)


_SINKS: dict[str, Callable[[int, TensorParallel], torch.Tensor | None]] = {
    "vanilla": lambda heads, tensor: None,
    "off-by-one": _zero_sink,
    "learnable": lambda heads, tensor: split_parameter((heads,), 0, tensor),
}
