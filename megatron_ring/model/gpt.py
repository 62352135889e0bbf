"""The GPT: token embedding, blocks, final norm, head; like Llama or like GPT-2 by ModelConfig, and pre-norm in both.

It is given its tokens' positions and an attention function, and knows no ranks and no layout: shuffle the tokens and
their positions together and the logits come out shuffled alike, which is all that striping asks of it. It has no
dropout, computes no loss, and does not split itself over the tensor or pipeline axis.
"""

import torch
from torch import nn
from torch.nn import functional

from megatron_ring.config import ModelConfig
from megatron_ring.kernels.norm import norm
from megatron_ring.kernels.rope import Rope, Rotation
from megatron_ring.model.attention import AttentionFunction, SelfAttention
from megatron_ring.model.initialization import initialize
from megatron_ring.model.mlp import mlp


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on a normalised copy and added back."""

    def __init__(self, config: ModelConfig, attention: AttentionFunction, window: int):
        super().__init__()
        self.attention_norm = norm(config.normalization, config.hidden_size, config.norm_epsilon)
        self.attention = SelfAttention(config, attention, window)
        self.mlp_norm = norm(config.normalization, config.hidden_size, config.norm_epsilon)
        self.mlp = mlp(config)

    def forward(
        self, x_BlE: torch.Tensor, rotation: Rotation | None, document_starts: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, l, E) -> (B, l, E)."""
        x_BlE = x_BlE + self.attention(self.attention_norm(x_BlE), rotation, document_starts)
        return x_BlE + self.mlp(self.mlp_norm(x_BlE))


class GPT(nn.Module):
    """A whole model. Its initial weights follow from ``seed`` alone.

    ``seq_length`` is S, the whole sample: the rows of a learned position table, and what RoPE's stretch is derived
    from. ``positions_l`` are the int64 positions in the sample of the tokens at hand, in any order; (B, l) is taken
    too, for samples that number their tokens differently, document by document for example. ``document_starts`` goes
    to the attention function, whose protocol says what it is; None: a sample is one document.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seq_length: int, attention: AttentionFunction, seed: int):
        super().__init__()
        learned = config.position_embedding_type == "learned_absolute"
        self.rope = None if learned else rope(config, seq_length)
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(seq_length, config.hidden_size) if learned else None
        self.blocks = nn.ModuleList(Block(config, attention, config.window_of(n)) for n in range(config.num_layers))
        self.final_norm = norm(config.normalization, config.hidden_size, config.norm_epsilon)
        untied = config.untie_embeddings_and_output_weights
        self.output = nn.Linear(config.hidden_size, vocab_size, bias=False) if untied else None
        initialize(self, config, seed)

    def forward(
        self, tokens_Bl: torch.Tensor, positions_l: torch.Tensor, document_starts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """logits_BlV of int64 tokens, in the dtype of the weights."""
        return self.head(self.hidden(tokens_Bl, positions_l, document_starts))

    def hidden(
        self, tokens_Bl: torch.Tensor, positions_l: torch.Tensor, document_starts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """hidden_BlE, normalised: what the head reads."""
        x_BlE = self.embed(tokens_Bl, positions_l)
        rotation = self.rotation(positions_l)
        for block in self.blocks:
            x_BlE = block(x_BlE, rotation, document_starts)
        return self.final_norm(x_BlE)

    def embed(self, tokens_Bl: torch.Tensor, positions_l: torch.Tensor) -> torch.Tensor:
        """x_BlE: the tokens' rows, plus their positions' where those are learned."""
        x_BlE = self.embedding(tokens_Bl)
        return x_BlE if self.position_embedding is None else x_BlE + self.position_embedding(positions_l)

    def rotation(self, positions_l: torch.Tensor) -> Rotation | None:
        """What turns every layer's queries and keys, made once a forward; None where positions are learned."""
        return None if self.rope is None else self.rope.rotation(positions_l)

    def head(self, hidden_BlE: torch.Tensor) -> torch.Tensor:
        """logits_BlV."""
        return functional.linear(hidden_BlE, self.output_weight_VE)

    @property
    def output_weight_VE(self) -> torch.Tensor:
        """The head's matrix: the embedding itself when tied (Press and Wolf 2017), so that it is one parameter."""
        return self.embedding.weight if self.output is None else self.output.weight


def rope(config: ModelConfig, seq_length: int) -> Rope:
    """RoPE as the config has it, stretched by the length of the whole sample."""
    original_length = config.rope_original_length or seq_length / config.rope_scaling_factor
    return Rope(config.head_dim, config.rotary_base, config.rope_scaling, config.rope_scaling_factor, original_length)


def parameter_count(config: ModelConfig, vocab_size: int, seq_length: int) -> int:
    """Parameters of GPT(config, vocab_size, seq_length), tied ones once, without building it."""
    E, F, KV = config.hidden_size, config.feed_forward_size, config.key_value_heads * config.head_dim
    bias, matrices = int(config.add_bias_linear), 3 if config.activation == "swiglu" else 2
    in_norm = 2 * E if config.normalization == "LayerNorm" else E
    in_attention = 2 * E * E + 2 * E * KV + bias * (2 * E + 2 * KV)
    in_attention += config.num_attention_heads if config.softmax_type == "learnable" else 0
    in_mlp = matrices * E * F + bias * ((matrices - 1) * F + E)
    rows = vocab_size * (2 if config.untie_embeddings_and_output_weights else 1)
    rows += seq_length if config.position_embedding_type == "learned_absolute" else 0
    return rows * E + config.num_layers * (in_attention + in_mlp + 2 * in_norm) + in_norm


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: matrices decay; norms, biases and sinks do not. Every parameter is in one, tied ones once."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
