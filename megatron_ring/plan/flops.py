"""Floating-point operations, counted from the config.

Matrix products only, a multiply-add as two operations, backward as twice forward, attention by the pairs that its
mask lets through: causal attention as half of the square, windows and documents as less (as in PaLM, Chowdhery et al.
2022, appendix B, but for the mask). Recomputation is not counted, so that the utilisation is of the model, not of the
hardware. Published figures of model FLOPs utilisation (MFU) count attention by the full square of
the sample instead (PaLM's 12 L H Q T a token, Narayanan et al. 2021): ``full_attention_flops``.
"""

from collections import Counter

import torch

from megatron_ring.config import ModelConfig


def training_flops(config: ModelConfig, vocab_size: int, document_lengths: torch.Tensor) -> int:
    """Forward and backward of samples that hold documents of these lengths; a sample without a mask is one document."""
    layers_of = Counter(config.window_of(layer) for layer in range(config.num_layers))
    pairs = sum(
        layers * visible_pairs(document_lengths, window) for window, layers in layers_of.items()
    )
    return _training_flops(config, vocab_size, int(document_lengths.sum()), pairs)


def full_attention_flops(
    config: ModelConfig, vocab_size: int, seq_length: int, sequences: int
) -> int:
    """Return ``training_flops`` by the usual convention: every query with every key of its sample.

    It halves nothing for the causal mask and spares nothing for windows and documents.
    """
    tokens = sequences * seq_length
    return _training_flops(config, vocab_size, tokens, config.num_layers * tokens * seq_length)


def _training_flops(config: ModelConfig, vocab_size: int, tokens: int, pairs: int) -> int:
    """pairs: (query, key) pairs of all layers together."""
    attention_width = config.num_attention_heads * config.head_dim
    key_value_width = config.key_value_heads * config.head_dim
    projections = config.hidden_size * (2 * attention_width + 2 * key_value_width)
    matrices = 3 if config.activation == "swiglu" else 2
    feed_forward = matrices * config.hidden_size * config.feed_forward_size
    per_token = config.num_layers * (projections + feed_forward) + config.hidden_size * vocab_size
    return 3 * 2 * (tokens * per_token + 2 * attention_width * pairs)


def visible_pairs(document_lengths: torch.Tensor, window: int) -> int:
    """(query, key) pairs that causal attention within documents of these lengths sees; a ``window`` of 0 is none."""
    lengths = document_lengths.long()
    # The first W tokens of a document see one more each, the later ones W.
    growing = lengths.clamp(max=window) if window else lengths
    return int((growing * (growing + 1) // 2 + (lengths - growing) * window).sum())
