"""The overlap criterion against its known closed forms, for two-byte and four-byte elements."""

import pytest
import torch

from benchmarks.overlap_criterion import CAUSAL, FULL, Hop, operations
from megatron_ring.context_parallel.hop_cost import (
    BACKWARD_PRODUCTS,
    FORWARD_PRODUCTS,
    backward_bytes,
)

FLOPS = 600e12  # operations per second of one GPU
BANDWIDTH = 50e9  # bytes per second of one 400 Gb/s network adapter
HEADS = 32
HEAD_DIM = 128


def one_token(
    kv_heads: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q and kv of one token, without storage."""
    q = torch.empty(1, 1, HEADS, HEAD_DIM, dtype=dtype, device="meta")
    kv = torch.empty(2, 1, 1, kv_heads, HEAD_DIM, dtype=dtype, device="meta")
    return q, kv


def forward(kv_heads: int, pairs: float = CAUSAL, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the tokens needed in the forward pass."""
    _, kv = one_token(kv_heads, dtype)
    hop = Hop(pairs * operations(FORWARD_PRODUCTS, HEADS, HEAD_DIM), kv.nbytes)
    return hop.shortest_shard(FLOPS, BANDWIDTH)


def backward(kv_heads: int, travels: str, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the tokens needed in the backward pass, in which "keys" or "queries" travel."""
    sent = backward_bytes(*one_token(kv_heads, dtype))[travels]
    hop = Hop(CAUSAL * operations(BACKWARD_PRODUCTS, HEADS, HEAD_DIM), sent)
    return hop.shortest_shard(FLOPS, BANDWIDTH)


@pytest.mark.parametrize("kv_heads", [1, 4, 8, 32])
def test_causal_hops_with_two_byte_keys_need_twice_the_share_of_heads_sent(kv_heads):
    assert forward(kv_heads) == pytest.approx(2 * kv_heads / HEADS * FLOPS / BANDWIDTH)


def test_full_hops_with_equal_heads_match_the_ring_attention_paper():
    assert forward(HEADS, FULL) == pytest.approx(FLOPS / BANDWIDTH)


@pytest.mark.parametrize("kv_heads", [1, 8, 32])
def test_backward_with_travelling_two_byte_keys_needs_a_fifth_more(kv_heads):
    assert backward(kv_heads, "keys") == pytest.approx(1.2 * forward(kv_heads))


def test_four_byte_keys_need_twice_as_much_forward_and_less_than_that_backward():
    in_float32 = forward(8, dtype=torch.float32)
    assert in_float32 == pytest.approx(2 * forward(8))
    assert backward(8, "keys", torch.float32) == pytest.approx(0.8 * in_float32)


def test_equal_heads_need_less_backward_if_queries_travel():
    lse_and_delta = 1 + 1 / HEAD_DIM
    assert backward(HEADS, "queries") == pytest.approx(0.8 * lse_and_delta * forward(HEADS))
