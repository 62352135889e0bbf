"""FLOPs counted from the config are those of the built model's matmuls and of the visible pairs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.config import ModelConfig
from megatron_ring.model.gpt import GPT
from megatron_ring.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from megatron_ring.plan.flops import full_attention_flops, training_flops, visible_pairs

VOCAB, SEQ = 61, 32
LLAMA = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2)


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        ModelConfig(
            num_layers=3,
            hidden_size=48,
            num_attention_heads=4,
            activation="gelu",
            normalization="LayerNorm",
        ),
        replace(LLAMA, kv_channels=24, qk_layernorm=True, add_qkv_bias=True),
    ],
    ids=["like Llama", "like GPT-2", "like Qwen"],
)
def test_flops_are_six_per_matmul_weight_and_half_of_the_square_of_attention(config):
    model = GPT(config, VOCAB, SEQ, attention=None)
    linear = (ColumnParallelLinear, RowParallelLinear)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, linear))
    head = VOCAB * config.hidden_size  # tied: a matmul with the embedding
    pairs = sum(position + 1 for position in range(SEQ))
    attention = 2 * 2 * 3 * config.num_layers * config.num_attention_heads * config.head_dim * pairs
    assert (
        training_flops(config, VOCAB, torch.tensor([SEQ])) == 6 * SEQ * (weights + head) + attention
    )


@given(lengths=st.lists(st.integers(0, 20), max_size=5), window=st.integers(0, 25))
def test_visible_pairs_are_those_of_the_mask(lengths, window):
    pairs = sum(
        key <= query and (window == 0 or query - key < window)
        for length in lengths
        for query in range(length)
        for key in range(length)
    )
    assert visible_pairs(torch.tensor(lengths, dtype=torch.int64), window) == pairs


def test_pairs_are_exact_beyond_32_bits_and_float64():
    lengths = torch.tensor([2**31 - 1], dtype=torch.int32)
    assert visible_pairs(lengths, 0) == (2**31 - 1) * 2**30
    assert visible_pairs(lengths, 3) == 3 * (2**31 - 1) - 3


def test_layers_with_a_window_do_not_count_pairs_outside_it():
    windowed = replace(LLAMA, num_layers=5, window_size=8, window_attn_skip_freq=3)
    lengths = torch.tensor([SEQ, SEQ])
    outside = 4 * (visible_pairs(lengths, 0) - visible_pairs(lengths, 8))
    full = training_flops(replace(LLAMA, num_layers=5), VOCAB, lengths)
    assert outside > 0
    assert full - training_flops(windowed, VOCAB, lengths) == 2 * 2 * 3 * 32 * outside


def test_two_samples_cost_twice_as_much_and_documents_cost_less():
    whole = training_flops(LLAMA, VOCAB, torch.tensor([SEQ, SEQ]))
    assert whole == 2 * training_flops(LLAMA, VOCAB, torch.tensor([SEQ]))
    assert training_flops(LLAMA, VOCAB, torch.tensor([SEQ, 5, SEQ - 5])) < whole


def test_the_usual_convention_counts_the_full_square_and_neither_window_nor_documents():
    """6 per matmul weight and token, and 12 L H D S per token, as in PaLM, appendix B."""
    model = replace(LLAMA, window_size=8)
    one_token = torch.tensor([1])  # attends to itself only
    weights_per_token = training_flops(model, VOCAB, one_token) - 12 * 2 * 32
    width = model.num_attention_heads * model.head_dim
    attention_per_token = 12 * model.num_layers * width * SEQ
    expected = 3 * SEQ * (weights_per_token + attention_per_token)
    assert full_attention_flops(model, VOCAB, SEQ, sequences=3) == expected
    assert full_attention_flops(LLAMA, VOCAB, SEQ, 3) == expected
