"""The GPT: embedding, layers, final norm, head; pre-norm, Llama-like or GPT-2-like by ModelConfig.

It receives the tokens' positions and an attention function and does not depend on the layout of the
sequence: if tokens and positions are permuted together, the logits are permuted alike, which is
what striped layouts rely on. It has no dropout. Modules are constructed without values;
``initialization.build`` allocates and initializes them.

``tensor`` is the tensor-parallel group that layers are split over, ``operations`` the
implementations of fused operations, and ``memory`` the recomputation, offloading and chunk sizes.
They change numbers by rounding at most.

In shapes, ``m`` is the tokens of the residual stream on this process: l, or l/T under
sequence_parallel.
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional

from megatron_ring.config import MemoryConfig, ModelConfig
from megatron_ring.kernels.cross_entropy import head_loss_sum
from megatron_ring.kernels.fused.operations import TORCH, Operations
from megatron_ring.kernels.norm import Norm, ResidualNorm, norm, residual_norm
from megatron_ring.kernels.rope import Rope, Rotation
from megatron_ring.model.attention import AttentionFunction, SelfAttention
from megatron_ring.model.initialization import initialize
from megatron_ring.model.mlp import mlp
from megatron_ring.model.offload import Offload
from megatron_ring.model.recompute import DEFAULT_MEMORY, in_chunks, run_block
from megatron_ring.parallel.tensor import (
    VocabularyParallelEmbedding,
    all_reduce_replicated_grads,
    part_shape,
    vocabulary_part,
)
from megatron_ring.parallel.tensor_exchange import (
    ALONE,
    TensorParallel,
    local_tokens,
    to_tensor_region,
)


class Block(nn.Module):
    """One layer: attention, then MLP, each on a normalized input and added to the stream."""

    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionFunction,
        window: int,
        tensor: TensorParallel = ALONE,
        operations: Operations = TORCH,
        memory: MemoryConfig = DEFAULT_MEMORY,
    ):
        super().__init__()
        self.mlp_chunks = memory.mlp_chunks
        recomputed = memory.recompute != "none"
        self.attention_norm = _residual_norm(config, operations)
        self.attention = SelfAttention(config, attention, window, tensor, operations, recomputed)
        self.mlp_norm = _residual_norm(config, operations)
        self.mlp = mlp(config, tensor, operations, recomputed or memory.mlp_chunks > 1)

    def forward(
        self, x_BmE: torch.Tensor, rotation: Rotation | None, document_starts: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, m, E) -> (B, m, E)."""
        x_BmE, normalized_BmE = self.attention_norm(x_BmE)
        attended_BmE = self.attention(normalized_BmE, rotation, document_starts)
        if self.mlp_chunks == 1:
            x_BmE, normalized_BmE = self.mlp_norm(x_BmE, attended_BmE)
            return x_BmE + self.mlp(normalized_BmE)
        x_BmE = x_BmE + attended_BmE
        return x_BmE + in_chunks(self._feed_forward, x_BmE, self.mlp_chunks)

    def _feed_forward(self, x_BmE: torch.Tensor) -> torch.Tensor:
        _, normalized_BmE = self.mlp_norm(x_BmE)
        return self.mlp(normalized_BmE)


class Layers(nn.Module):
    """A range of a GPT's layers: all of them in a whole model, those of one stage in a pipeline.

    The learned position table belongs to the first layer's range, the final norm to the last
    layer's. Parameters have the names that they have in a whole model, and so the same initial
    values.
    """

    def __init__(
        self,
        config: ModelConfig,
        seq_length: int,
        attention: AttentionFunction,
        tensor: TensorParallel = ALONE,
        operations: Operations = TORCH,
        memory: MemoryConfig = DEFAULT_MEMORY,
        layers: range | None = None,
    ):
        super().__init__()
        layers = range(config.num_layers) if layers is None else layers
        has_learned_positions = config.position_embedding_type == "learned_absolute"
        has_position_table = has_learned_positions and layers.start == 0
        has_final_norm = layers.stop == config.num_layers
        self.tensor = tensor
        self.operations = operations
        self.memory = memory
        self.rope = None if has_learned_positions else rope(config, seq_length)
        self.position_embedding = None
        if has_position_table:
            # Without the initialization of nn.Embedding, for which torch loads its decompositions
            # on the meta device: 75 MB of memory.
            table_SE = torch.empty(seq_length, config.hidden_size)
            self.position_embedding = nn.Embedding.from_pretrained(table_SE, freeze=False)
        self.blocks = nn.ModuleDict()
        for layer in layers:
            window = config.window_of(layer)
            self.blocks[str(layer)] = Block(config, attention, window, tensor, operations, memory)
        self.final_norm = _norm(config, operations) if has_final_norm else None

    def run(
        self, x_BmE: torch.Tensor, positions_l: torch.Tensor, document_starts: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, m, E) -> (B, m, E), normalized after the last layer."""
        if self.position_embedding is not None:
            x_BmE = x_BmE + self.position_embedding(local_tokens(positions_l, self.tensor))
        rotation = self.rotation(positions_l)
        offload = Offload(x_BmE.device)
        for block in self.blocks.values():
            with offload.layer() if self.memory.offload_activations else nullcontext():
                x_BmE = run_block(block, self.memory, x_BmE, rotation, document_starts)
        return x_BmE if self.final_norm is None else self.final_norm(x_BmE)

    def rotation(self, positions_l: torch.Tensor) -> Rotation | None:
        """Return cos and sin for all layers, once per forward; None if positions are learned."""
        return None if self.rope is None else self.rope.rotation(positions_l)


class Vocabulary(VocabularyParallelEmbedding):
    """The ``embedding`` or ``output`` matrix: E per token id, ids split over the tensor ranks."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        tensor: TensorParallel = ALONE,
        operations: Operations = TORCH,
        memory: MemoryConfig = DEFAULT_MEMORY,
    ):
        super().__init__(vocab_size, config.hidden_size, tensor)
        self.operations = operations
        self.memory = memory


class GPT(Layers):
    """A whole model.

    ``seq_length`` is S, the length of the whole sample: the rows of a learned position table, and
    the default from which RoPE scaling is derived. ``positions_l`` are the int64 positions in the
    sample of this process's tokens, in any order; they may be (B, l) where samples number their
    tokens differently, for example document by document. ``document_starts`` is passed to the
    attention function, whose protocol defines it; None: a sample is one document.

    With ``seed`` the constructor also initializes every parameter, and gradients of replicated
    parameters are summed over ``tensor``. A training run builds the model with
    ``initialization.build`` instead, which does the same and allocates only what a rank keeps.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        seq_length: int,
        attention: AttentionFunction,
        tensor: TensorParallel = ALONE,
        operations: Operations = TORCH,
        memory: MemoryConfig = DEFAULT_MEMORY,
        seed: int | None = None,
    ):
        super().__init__(config, seq_length, attention, tensor, operations, memory)
        shared = (config, vocab_size, tensor, operations, memory)
        self.embedding = Vocabulary(*shared)
        self.output = Vocabulary(*shared) if config.untie_embeddings_and_output_weights else None
        if seed is not None:
            initialize(self, config, seed)
            all_reduce_replicated_grads(self, tensor)

    def forward(
        self,
        tokens_Bl: torch.Tensor,
        positions_l: torch.Tensor,
        document_starts: torch.Tensor | None = None,
        targets_Bl: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss sum in nats over tokens with a target; without targets, logits_Blv.

        The logits are in the dtype of the weights, over this tensor rank's part of the vocabulary.
        One method does both, because DeepSpeed's hooks wrap forward.
        """
        hidden_BmE = self.hidden(tokens_Bl, positions_l, document_starts)
        if targets_Bl is None:
            return self.head(hidden_BmE)
        weight_vE = self.output_weight_VE
        return loss_sum(
            hidden_BmE, weight_vE, targets_Bl, self.tensor, self.operations, self.memory
        )

    def hidden(
        self,
        tokens_Bl: torch.Tensor,
        positions_l: torch.Tensor,
        document_starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return hidden_BmE, normalized: the input of the head."""
        return self.run(self.embedding(tokens_Bl), positions_l, document_starts)

    def head(self, hidden_BmE: torch.Tensor) -> torch.Tensor:
        """Return logits_Blv."""
        hidden_BlE = to_tensor_region(hidden_BmE, self.tensor)
        return functional.linear(hidden_BlE, self.output_weight_VE)

    @property
    def output_weight_VE(self) -> torch.Tensor:
        """The head's matrix: the embedding itself when tied (Press and Wolf 2017)."""
        return self.embedding.weight if self.output is None else self.output.weight


def loss_sum(
    hidden_BmE: torch.Tensor,
    weight_vE: torch.Tensor,
    targets_Bl: torch.Tensor,
    tensor: TensorParallel = ALONE,
    operations: Operations = TORCH,
    memory: MemoryConfig = DEFAULT_MEMORY,
) -> torch.Tensor:
    """Return the float32 loss sum in nats, of head and cross entropy in one.

    Collective over the tensor ranks, each of which has a part of the vocabulary.
    """
    return head_loss_sum(
        to_tensor_region(hidden_BmE, tensor),
        weight_vE,
        targets_Bl,
        memory.loss_chunk_size,
        vocabulary_part(weight_vE, tensor),
        cross_entropy=operations.cross_entropy,
    )


def _residual_norm(config: ModelConfig, operations: Operations) -> ResidualNorm:
    """Return a norm of the residual stream at the beginning of half a block."""
    return residual_norm(
        config.normalization,
        config.hidden_size,
        config.norm_epsilon,
        operations.norm,
        operations.residual_norm,
    )


def _norm(config: ModelConfig, operations: Operations) -> Norm:
    """Return the norm of the residual stream after the last block."""
    return norm(config.normalization, config.hidden_size, config.norm_epsilon, operations.norm)


def rope(config: ModelConfig, seq_length: int) -> Rope:
    """Return RoPE as configured; its scaling is derived from the length of the whole sample."""
    original_length = config.rope_original_length or seq_length / config.rope_scaling_factor
    return Rope(
        config.head_dim,
        config.rotary_base,
        config.rope_scaling,
        config.rope_scaling_factor,
        original_length,
    )


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return optimizer groups: matrices decay; norms, biases and sinks do not.

    Every parameter is in one group, tied ones once.
    """
    matrices = [p for p in model.parameters() if len(part_shape(p)) >= 2]
    vectors = [p for p in model.parameters() if len(part_shape(p)) < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
