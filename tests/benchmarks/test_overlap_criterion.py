"""The criterion in the closed forms that are known of it, for two-byte and four-byte keys."""

import pytest
import torch

from benchmarks.overlap_criterion import CAUSAL, FULL, Hop, operations
from megatron_ring.context_parallel.counted import BACKWARD_PRODUCTS, FORWARD_PRODUCTS
from megatron_ring.context_parallel.traffic import backward_bytes

FLOPS, BANDWIDTH = 600e12, 50e9  # a second; of one GPU, and of one 400 Gb/s network card
HEADS, SIZE = 32, 128


def shard(groups: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """q and kv of one token."""
    of = {"dtype": dtype, "device": "meta"}
    return torch.empty(1, 1, HEADS, SIZE, **of), torch.empty(2, 1, 1, groups, SIZE, **of)


def forward(groups: int, pairs: float = CAUSAL, dtype: torch.dtype = torch.bfloat16) -> float:
    hop = Hop(pairs * operations(FORWARD_PRODUCTS, HEADS, SIZE), shard(groups, dtype)[1].nbytes)
    return hop.shortest_shard(FLOPS, BANDWIDTH)


def backward(groups: int, travels: str, dtype: torch.dtype = torch.bfloat16) -> float:
    hop = Hop(
        CAUSAL * operations(BACKWARD_PRODUCTS, HEADS, SIZE),
        backward_bytes(*shard(groups, dtype))[travels],
    )
    return hop.shortest_shard(FLOPS, BANDWIDTH)


@pytest.mark.parametrize("groups", [1, 4, 8, 32])
def test_halved_hops_of_two_byte_keys_need_twice_the_share_of_heads_that_travel(groups):
    assert forward(groups) == pytest.approx(2 * groups / HEADS * FLOPS / BANDWIDTH)


def test_full_hops_of_equal_heads_need_what_ring_attention_s_paper_says():
    assert forward(HEADS, FULL) == pytest.approx(FLOPS / BANDWIDTH)


@pytest.mark.parametrize("groups", [1, 8, 32])
def test_backward_where_two_byte_keys_travel_is_a_fifth_stricter(groups):
    assert backward(groups, "keys") == pytest.approx(1.2 * forward(groups))


def test_four_byte_keys_need_twice_as_much_forward_and_less_than_that_backward():
    assert forward(8, dtype=torch.float32) == pytest.approx(2 * forward(8))
    assert backward(8, "keys", torch.float32) == pytest.approx(
        0.8 * forward(8, dtype=torch.float32)
    )


def test_equal_heads_need_less_backward_where_their_queries_travel():
    lse_and_delta = 1 + 1 / SIZE
    assert backward(HEADS, "queries") == pytest.approx(0.8 * lse_and_delta * forward(HEADS))
