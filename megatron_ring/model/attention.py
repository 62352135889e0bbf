"""The attention layer: project, normalise, turn by position, attend, project back. Who sees whom is not said here.

Queries, keys and values have projections of their own, ``q_proj``, ``k_proj`` and ``v_proj``, rows ordered by head. A
tensor-parallel rank takes a run of rows of each, though keys and values have fewer heads, and a Hugging Face Llama
takes them as they are; a fused matrix would have to be taken apart for both.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from megatron_ring.config import ModelConfig
from megatron_ring.kernels.norm import NormFunction, norm
from megatron_ring.kernels.rope import Rotation
from megatron_ring.model.execution import PLAIN, Execution
from megatron_ring.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    mark_local_heads,
    split_parameter,
)
from megatron_ring.parallel.tensor_exchange import TensorParallel, to_tensor_region


class AttentionFunction(Protocol):
    """Causal attention over the whole sequence, of which this process holds l tokens; scaled by 1 / sqrt(D).

    Query head i reads key-value head i // (H / G). A token sees the tokens of its own document up to itself, and with
    a ``window`` above 0 only the last ``window`` of them, itself included. ``document_starts``, int64 (documents,) on
    the CPU, says where each document begins when the B whole samples are laid end to end: sample b begins at b * S.
    None: a sample is one document. The model neither knows nor asks where the other tokens live.
    """

    def __call__(
        self,
        q_BlHD: torch.Tensor,
        k_BlGD: torch.Tensor,
        v_BlGD: torch.Tensor,
        window: int,
        document_starts: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out_BlHD, in the dtype of ``q_BlHD``, and lse_BHl of the scores, natural log.

        lse is float32 (float64 for float64), and gradients flow through it as through the output.
        """
        ...


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H query heads over G key-value heads of size D.

    A tensor rank has H/T and G/T of them, with their sinks: heads meet only in the output projection. H x D need not
    be E. With ``qk_layernorm`` every query and key head is normalised by itself (Dehghani et al. 2023, Scaling Vision
    Transformers to 22 Billion Parameters, section 2), with weights of D that all heads, and so all tensor ranks, share.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionFunction,
        window: int,
        execution: Execution = PLAIN,
    ):
        super().__init__()
        self.head_dim = config.head_dim
        self.attention = attention
        self.window = window
        self.execution, tensor = execution, execution.tensor
        self.rope = execution.operations.rope
        self.sink_H = _SINKS[config.softmax_type](config.num_attention_heads, tensor)
        hidden, bias = config.hidden_size, config.add_bias_linear or config.add_qkv_bias
        queries, key_values = (
            n * config.head_dim for n in (config.num_attention_heads, config.key_value_heads)
        )
        self.q_proj = ColumnParallelLinear(hidden, queries, bias, tensor)
        self.k_proj = ColumnParallelLinear(hidden, key_values, bias, tensor)
        self.v_proj = ColumnParallelLinear(hidden, key_values, bias, tensor)
        self.q_norm, self.k_norm = (_head_norm(config, execution.operations.norm) for _ in range(2))
        self.out_proj = RowParallelLinear(queries, hidden, config.add_bias_linear, tensor)

    def forward(
        self, x_BmE: torch.Tensor, rotation: Rotation | None, document_starts: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, m, E). ``rotation`` is None for a model whose positions come from a table."""
        kept = self.execution.kept_for_attention(x_BmE)
        x_BlE = to_tensor_region(x_BmE, self.execution.tensor)
        projections = self.q_proj, self.k_proj, self.v_proj
        q_BlhD, k_BlgD, v_BlgD = (self._heads(proj(x_BlE, kept)) for proj in projections)
        q_BlhD, k_BlgD = self.q_norm(q_BlhD), self.k_norm(k_BlgD)
        if rotation is not None:
            # Before the attention function: keys are turned once, at home, and travel turned.
            q_BlhD, k_BlgD = self.rope(q_BlhD, k_BlgD, rotation)
        out_BlhD, lse_Bhl = self.attention(q_BlhD, k_BlgD, v_BlgD, self.window, document_starts)
        if self.sink_H is not None:
            out_BlhD = with_sink(out_BlhD, lse_Bhl, self.sink_H)
        return self.out_proj(out_BlhD.flatten(-2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


def _head_norm(config: ModelConfig, function: NormFunction) -> nn.Module:
    """What normalises a head, of the model's own kind; nothing without ``qk_layernorm``."""
    if not config.qk_layernorm:
        return nn.Identity()
    return mark_local_heads(
        norm(config.normalization, config.head_dim, config.norm_epsilon, function)
    )


def with_sink(out_BlHD: torch.Tensor, lse_BHl: torch.Tensor, sink_H: torch.Tensor) -> torch.Tensor:
    """``out_BlHD`` had every softmax one more key, of score ``sink_H`` and without a value; exact, in its dtype.

    The denominator grows from e^lse to e^lse + e^sink, so the output shrinks by sigmoid(lse - sink). Attention sinks
    are of Xiao et al. 2023 (Efficient Streaming Language Models with Attention Sinks, section 3.3), a learned score
    per head of OpenAI's gpt-oss (2025), a score of 0 of Miller 2023 (Attention Is Off By One).
    """
    # The product is float32 for bfloat16 output, because lse is; only the result is cast.
    share_BlH1 = torch.sigmoid(lse_BHl - sink_H.unsqueeze(-1)).transpose(1, 2).unsqueeze(-1)
    return (out_BlHD * share_BlH1).type_as(out_BlHD)


# A sink of score 0 is a buffer, so that it follows the model to its device, and follows from the config, so unsaved.
_SINKS: dict[str, Callable[[int, TensorParallel], torch.Tensor | None]] = {
    "vanilla": lambda heads, tensor: None,
    "off-by-one": lambda heads, tensor: nn.Buffer(
        torch.zeros(len(tensor.part(heads))), persistent=False
    ),
    "learnable": lambda heads, tensor: split_parameter((heads,), 0, tensor),
}
