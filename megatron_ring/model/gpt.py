"""The GPT: token embedding, layers, final norm, head; like Llama or like GPT-2 by ModelConfig, and pre-norm in both.

It is given its tokens' positions and an attention function, and knows no layout: shuffle the tokens and their
positions together and the logits come out shuffled alike, which is all that striping asks of it. How it is computed,
over which tensor ranks and in how many pieces, is an Execution's business. It has no dropout.

In shapes, ``m`` is the tokens of the residual stream that live here: l, or l/T under sequence_parallel.
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional

from megatron_ring.config import ModelConfig
from megatron_ring.kernels.cross_entropy import head_loss_sum
from megatron_ring.kernels.norm import Norm, norm
from megatron_ring.kernels.rope import Rope, Rotation
from megatron_ring.model.attention import AttentionFunction, SelfAttention
from megatron_ring.model.execution import PLAIN, Execution
from megatron_ring.model.initialization import initialize
from megatron_ring.model.mlp import mlp
from megatron_ring.model.offload import Offload
from megatron_ring.model.recompute import in_chunks, run_block
from megatron_ring.parallel.tensor import (
    VocabularyParallelEmbedding,
    all_reduce_replicated_grads,
    vocabulary_part,
)
from megatron_ring.parallel.tensor_exchange import own_tokens, to_tensor_region


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on a normalised copy and added back."""

    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionFunction,
        window: int,
        execution: Execution = PLAIN,
    ):
        super().__init__()
        self.mlp_chunks = execution.mlp_chunks
        self.attention_norm = _norm(config, execution)
        self.attention = SelfAttention(config, attention, window, execution)
        self.mlp_norm = _norm(config, execution)
        self.mlp = mlp(config, execution)

    def forward(
        self, x_BmE: torch.Tensor, rotation: Rotation | None, document_starts: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, m, E) -> (B, m, E)."""
        x_BmE = x_BmE + self.attention(self.attention_norm(x_BmE), rotation, document_starts)
        return x_BmE + in_chunks(self._feed_forward, x_BmE, self.mlp_chunks)

    def _feed_forward(self, x_BmE: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.mlp_norm(x_BmE))


class Layers(nn.Module):
    """A run of a GPT's layers: all of them in a whole model, those of one stage in a pipeline.

    What comes before the first layer, a learned position table, and after the last, the final norm, belongs to them.
    Parameters have the names and the initial values that they have in a whole model.
    """

    def __init__(
        self,
        config: ModelConfig,
        seq_length: int,
        attention: AttentionFunction,
        seed: int,
        execution: Execution = PLAIN,
        layers: range | None = None,
    ):
        super().__init__()
        layers = range(config.num_layers) if layers is None else layers
        learned = config.position_embedding_type == "learned_absolute"
        self.execution = execution
        self.rope = None if learned else rope(config, seq_length)
        has_table, has_norm = learned and layers.start == 0, layers.stop == config.num_layers
        self.position_embedding = (
            nn.Embedding(seq_length, config.hidden_size) if has_table else None
        )
        blocks = {str(n): Block(config, attention, config.window_of(n), execution) for n in layers}
        self.blocks = nn.ModuleDict(blocks)
        self.final_norm = _norm(config, execution) if has_norm else None
        initialize(self, config, seed)
        all_reduce_replicated_grads(self, execution.tensor)

    def run(
        self, x_BmE: torch.Tensor, positions_l: torch.Tensor, document_starts: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, m, E) -> (B, m, E), normalised behind the last layer."""
        if self.position_embedding is not None:
            x_BmE = x_BmE + self.position_embedding(own_tokens(positions_l, self.execution.tensor))
        rotation, offload = self.rotation(positions_l), Offload(x_BmE.device)
        for block in self.blocks.values():
            with offload.layer() if self.execution.offload_activations else nullcontext():
                x_BmE = run_block(block, self.execution, x_BmE, rotation, document_starts)
        return x_BmE if self.final_norm is None else self.final_norm(x_BmE)

    def rotation(self, positions_l: torch.Tensor) -> Rotation | None:
        """What turns every layer's queries and keys, made once a forward; None where positions are learned."""
        return None if self.rope is None else self.rope.rotation(positions_l)


class Vocabulary(VocabularyParallelEmbedding):
    """A row of E for every token id, split over the tensor ranks: the ``embedding``, or the ``output``'s matrix."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        vocab_size: int,
        seed: int,
        execution: Execution = PLAIN,
    ):
        super().__init__(vocab_size, config.hidden_size, execution.tensor)
        self.execution = execution
        initialize(self, config, seed, prefix=name)


class GPT(Layers):
    """A whole model. Its initial weights follow from ``seed`` alone.

    ``seq_length`` is S, the whole sample: the rows of a learned position table, and what RoPE's stretch is derived
    from. ``positions_l`` are the int64 positions in the sample of the tokens at hand, in any order; (B, l) is taken
    too, for samples that number their tokens differently, document by document for example. ``document_starts`` goes
    to the attention function, whose protocol says what it is; None: a sample is one document.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        seq_length: int,
        attention: AttentionFunction,
        seed: int,
        execution: Execution = PLAIN,
    ):
        super().__init__(config, seq_length, attention, seed, execution)
        untied = config.untie_embeddings_and_output_weights
        self.embedding = Vocabulary("embedding", config, vocab_size, seed, execution)
        self.output = Vocabulary("output", config, vocab_size, seed, execution) if untied else None

    def forward(
        self,
        tokens_Bl: torch.Tensor,
        positions_l: torch.Tensor,
        document_starts: torch.Tensor | None = None,
        targets_Bl: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss, in nats and summed over the tokens whose target counts; without targets logits_Blv.

        The logits are in the dtype of the weights, over this tensor rank's part of the vocabulary. One method for
        both, because forward is what DeepSpeed's hooks surround.
        """
        hidden_BmE = self.hidden(tokens_Bl, positions_l, document_starts)
        if targets_Bl is None:
            return self.head(hidden_BmE)
        return loss_sum(hidden_BmE, self.output_weight_VE, targets_Bl, self.execution)

    def hidden(
        self,
        tokens_Bl: torch.Tensor,
        positions_l: torch.Tensor,
        document_starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_BmE, normalised: what the head reads."""
        return self.run(self.embedding(tokens_Bl), positions_l, document_starts)

    def head(self, hidden_BmE: torch.Tensor) -> torch.Tensor:
        """logits_Blv."""
        return functional.linear(
            to_tensor_region(hidden_BmE, self.execution.tensor), self.output_weight_VE
        )

    @property
    def output_weight_VE(self) -> torch.Tensor:
        """The head's matrix: the embedding itself when tied (Press and Wolf 2017), so that it is one parameter."""
        return self.embedding.weight if self.output is None else self.output.weight


def loss_sum(
    hidden_BmE: torch.Tensor,
    weight_vE: torch.Tensor,
    targets_Bl: torch.Tensor,
    execution: Execution,
) -> torch.Tensor:
    """Head and cross entropy as one, over the tensor ranks' parts of the vocabulary: a float32 sum in nats."""
    hidden_BlE = to_tensor_region(hidden_BmE, execution.tensor)
    part = vocabulary_part(weight_vE, execution.tensor)
    cross_entropy = execution.operations.cross_entropy
    return head_loss_sum(
        hidden_BlE,
        weight_vE,
        targets_Bl,
        execution.loss_chunk_size,
        part,
        cross_entropy=cross_entropy,
    )


def _norm(config: ModelConfig, execution: Execution) -> Norm:
    """One over the residual stream."""
    return norm(
        config.normalization, config.hidden_size, config.norm_epsilon, execution.operations.norm
    )


def rope(config: ModelConfig, seq_length: int) -> Rope:
    """RoPE as the config has it, stretched by the length of the whole sample."""
    original_length = config.rope_original_length or seq_length / config.rope_scaling_factor
    return Rope(
        config.head_dim,
        config.rotary_base,
        config.rope_scaling,
        config.rope_scaling_factor,
        original_length,
    )


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: matrices decay; norms, biases and sinks do not. Every parameter is in one, tied ones once."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
