"""Bytes of every exchange, counted by hand for small sizes."""

import torch

from megatron_ring.config import Config, DataConfig, ModelConfig, TrainingConfig
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.parallel.grid import Grid
from megatron_ring.plan.communication import ring_tensors, stage_bytes, tensor_bytes, ulysses_bytes

CONFIG = Config(
    model=ModelConfig(hidden_size=64, num_attention_heads=8, num_query_groups=4),
    data=DataConfig(seq_length=48),
    training=TrainingConfig(micro_batch_size=3),
)
STRIPED = Layout("striped", 48, 2)


def test_a_ring_gets_a_members_share_of_a_tensor_ranks_heads():
    grid = Grid(ring=2, ulysses=2, tensor=2)
    q_BLhD, kv_2BLgD = ring_tensors(CONFIG, grid, STRIPED, torch.bfloat16)
    assert q_BLhD.shape == (3, 24, 2, 8)
    assert kv_2BLgD.shape == (2, 3, 24, 1, 8)


def test_fewer_key_value_heads_than_ulysses_members_are_repeated():
    grid = Grid(ring=2, ulysses=4, tensor=2)
    _, kv_2BLgD = ring_tensors(CONFIG, grid, STRIPED, torch.bfloat16)
    assert kv_2BLgD.shape == (2, 3, 24, 1, 8)  # 2 heads a tensor rank, 4 members: each head twice


def test_ulysses_members_do_not_send_their_own_share():
    tensors = ring_tensors(CONFIG, Grid(ring=2, ulysses=4), STRIPED, torch.float32)
    tokens, q, kv = 3 * 24, 2 * 8 * 4, 2 * 1 * 8 * 4
    before = tokens * (q + kv) * 3 // 4
    after = tokens * (q + 2 * 4) * 3 // 4
    assert ulysses_bytes(*tensors, 4) == (before, after)


def test_two_sums_over_tensor_ranks_are_two_reduce_scatters_and_two_all_gathers():
    assert tensor_bytes(1000, 2, gathers_again=0) == (4 * 500, 4 * 500)
    assert tensor_bytes(1000, 4, gathers_again=0) == (4 * 750, 4 * 750)


def test_an_input_gathered_again_costs_one_more_all_gather_in_backward():
    assert tensor_bytes(1000, 4, gathers_again=2) == (4 * 750, 6 * 750)


def test_a_stage_sends_the_stream_its_targets_and_positions():
    grid = Grid(pipe=2, tensor=2)
    assert stage_bytes(1000, 10, grid, sequence_parallel=False) == (1160, 1000)
    assert stage_bytes(1000, 10, grid, sequence_parallel=True) == (660, 500)
