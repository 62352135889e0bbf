"""FLOPs are counted from the config: matrix products of the built model, and the pairs that attention sees."""

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
def test_six_for_each_weight_of_a_product_and_half_of_the_square(config):
    model = GPT(config, VOCAB, SEQ, attention=None)
    products = (ColumnParallelLinear, RowParallelLinear)
    weights = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, products)
    )
    head = VOCAB * config.hidden_size  # tied: a product with the embedding
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


def test_pairs_are_exact_where_32_bits_or_a_float_would_not_be():
    lengths = torch.tensor([2**31 - 1], dtype=torch.int32)
    assert visible_pairs(lengths, 0) == (2**31 - 1) * 2**30
    assert visible_pairs(lengths, 3) == 3 * (2**31 - 1) - 3


def test_a_window_spares_its_layers_the_pairs_beyond_it():
    windowed = replace(LLAMA, num_layers=5, window_size=8, window_attn_skip_freq=3)
    lengths = torch.tensor([SEQ, SEQ])
    spared = 4 * (visible_pairs(lengths, 0) - visible_pairs(lengths, 8))
    full = training_flops(replace(LLAMA, num_layers=5), VOCAB, lengths)
    assert spared > 0
    assert full - training_flops(windowed, VOCAB, lengths) == 2 * 2 * 3 * 32 * spared


def test_two_samples_cost_twice_as_much_and_documents_cost_less():
    whole = training_flops(LLAMA, VOCAB, torch.tensor([SEQ, SEQ]))
    assert whole == 2 * training_flops(LLAMA, VOCAB, torch.tensor([SEQ]))
    assert training_flops(LLAMA, VOCAB, torch.tensor([SEQ, 5, SEQ - 5])) < whole


def test_the_usual_convention_counts_the_full_square_and_neither_window_nor_documents():
    """6 for each weight of a product and token, and 12 L H D S a token: as in PaLM, appendix B."""
    model = replace(LLAMA, window_size=8)
    weights = (
        training_flops(model, VOCAB, torch.tensor([1])) - 12 * 2 * 32
    )  # of one token, that sees itself
    expected = (
        3
        * SEQ
        * (weights + 12 * model.num_layers * model.num_attention_heads * model.head_dim * SEQ)
    )
    assert full_attention_flops(model, VOCAB, SEQ, sequences=3) == expected
    assert full_attention_flops(LLAMA, VOCAB, SEQ, 3) == expected
