"""Floating-point operations, counted from the config, and the rate a device could reach at most.

Matrix products only, a multiply-add as two operations, backward as twice forward, attention by the pairs that its
mask lets through: causal attention as half of the square, windows and documents as less (as in PaLM, Chowdhery et al.
2022, appendix B, but for the mask). Recomputation is not counted, so that the utilisation is of the model, not of the
hardware.
"""

import time
from collections import Counter

import torch

from megatron_ring.config import ModelConfig

# Dense peaks in FLOP/s by the vendors' data sheets, by a part of the device's name.
_PEAKS = {
    ("A100", torch.bfloat16): 312e12,
    ("A100", torch.float16): 312e12,
    ("H100", torch.bfloat16): 989e12,
    ("H100", torch.float16): 989e12,
    ("H200", torch.bfloat16): 989e12,
    ("H200", torch.float16): 989e12,
}


def training_flops(config: ModelConfig, vocab_size: int, document_lengths: torch.Tensor) -> int:
    """Forward and backward of samples that hold documents of these lengths; a sample without a mask is one document."""
    attention_width = config.num_attention_heads * config.head_dim
    key_value_width = config.key_value_heads * config.head_dim
    projections = config.hidden_size * (2 * attention_width + 2 * key_value_width)
    matrices = 3 if config.activation == "swiglu" else 2
    feed_forward = matrices * config.hidden_size * config.feed_forward_size
    per_token = config.num_layers * (projections + feed_forward) + config.hidden_size * vocab_size
    layers_of = Counter(config.window_of(layer) for layer in range(config.num_layers))
    pairs = sum(layers * visible_pairs(document_lengths, window) for window, layers in layers_of.items())
    scores_and_values = 2 * attention_width * pairs
    forward = 2 * (int(document_lengths.sum()) * per_token + scores_and_values)
    return 3 * forward


def visible_pairs(document_lengths: torch.Tensor, window: int) -> int:
    """(query, key) pairs that causal attention within documents of these lengths sees; a ``window`` of 0 is none."""
    lengths = document_lengths.long()
    # The first W tokens of a document see one more each, the later ones W.
    growing = lengths.clamp(max=window) if window else lengths
    return int((growing * (growing + 1) // 2 + (lengths - growing) * window).sum())


def peak_flops(device: str, dtype: torch.dtype) -> tuple[float, str]:
    """What one process could reach, in FLOP/s, and where the number comes from: a data sheet, else a measurement."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    for (part, of_dtype), peak in _PEAKS.items():
        if part in name and of_dtype == dtype:
            return peak, f"{part} data sheet"
    return _measured_product_rate(device, dtype), "measured on a 1024 x 1024 product"


def _measured_product_rate(device: str, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))

    def seconds() -> float:
        start = time.perf_counter()
        (a @ b).sum().item()  # .item() waits for the device
        return time.perf_counter() - start

    return 2 * size**3 / min(seconds() for _ in range(repeats))
