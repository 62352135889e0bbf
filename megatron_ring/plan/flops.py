"""Floating-point operations of training, counted from the config.

Counted are matmuls only, with a multiply-add as two operations and backward as twice forward.
Attention counts the pairs that its mask admits: half of the square for causal attention, less with
windows and documents (as in PaLM, Chowdhery et al. 2022, appendix B, except for the mask).
Recomputation is not counted, so that the utilization is of the model and not of the hardware.
Published figures of model FLOPs utilization (MFU) count attention by the full square of the sample
instead (PaLM's 12 L H Q T per token, Narayanan et al. 2021): ``full_attention_flops``.
"""

import math
from collections import Counter

import torch

from megatron_ring.config import ModelConfig
from megatron_ring.data.sample_assignment import visible_pairs
from megatron_ring.model.shapes import layer_shapes


def training_flops(config: ModelConfig, vocab_size: int, document_lengths: torch.Tensor) -> int:
    """Return the FLOPs of forward and backward over samples with documents of these lengths.

    A sample without a document mask is one document.
    """
    layers_of_window = Counter(config.window_of(layer) for layer in range(config.num_layers))
    pairs = sum(
        layers * visible_pairs(document_lengths, window)
        for window, layers in layers_of_window.items()
    )
    return _training_flops(config, vocab_size, int(document_lengths.sum()), pairs)


def full_attention_flops(
    config: ModelConfig, vocab_size: int, seq_length: int, sequences: int
) -> int:
    """Return ``training_flops`` by the usual convention: every query with every key of its sample.

    The causal mask, windows and documents do not reduce it.
    """
    tokens = sequences * seq_length
    return _training_flops(config, vocab_size, tokens, config.num_layers * tokens * seq_length)


def _training_flops(config: ModelConfig, vocab_size: int, tokens: int, pairs: int) -> int:
    """Return the FLOPs for ``pairs`` (query, key) pairs of all layers together."""
    matrices = [shape for shape in layer_shapes(config).values() if len(shape) == 2]
    weights_of_layer = sum(map(math.prod, matrices))
    per_token = config.num_layers * weights_of_layer + config.hidden_size * vocab_size
    attention_width = config.num_attention_heads * config.head_dim
    return 3 * 2 * (tokens * per_token + 2 * attention_width * pairs)
