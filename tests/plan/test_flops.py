"""FLOPs are counted from the config: matrix products of the built model, and half of the attention square."""

import pytest
import torch
from torch import nn

from megatron_ring.config import ModelConfig
from megatron_ring.model.gpt import GPT
from megatron_ring.plan.flops import peak_flops, training_flops_per_token

VOCAB, SEQ = 61, 32


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2),
        ModelConfig(num_layers=3, hidden_size=48, num_attention_heads=4, activation="gelu", normalization="LayerNorm"),
    ],
    ids=["like Llama", "like GPT-2"],
)
def test_six_for_each_weight_of_a_product_and_half_of_the_square(config):
    model = GPT(config, VOCAB, SEQ, attention=None, seed=0)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    head = VOCAB * config.hidden_size  # tied: a product with the embedding
    pairs = sum(position + 1 for position in range(SEQ))
    attention = 2 * 2 * 3 * config.num_layers * config.hidden_size * pairs / SEQ
    assert training_flops_per_token(config, VOCAB, SEQ) == 6 * (weights + head) + attention


def test_a_device_with_no_data_sheet_is_measured():
    rate, source = peak_flops("cpu", torch.float32)
    assert rate > 0
    assert "measured" in source


def test_a_device_with_a_data_sheet_is_looked_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert peak_flops("cuda", torch.bfloat16) == (989e12, "H100 data sheet")
