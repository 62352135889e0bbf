import torch

from megatron_ring.config import Config, DataConfig, ModelConfig, TrainingConfig
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.parallel.grid import Grid
from megatron_ring.plan.messages import ring_tensors, stage_bytes, tensor_bytes, ulysses_bytes

CONFIG = Config(
    model=ModelConfig(hidden_size=64, num_attention_heads=8, num_query_groups=4),
    data=DataConfig(seq_length=48),
    training=TrainingConfig(micro_batch_size=3),
)
STRIPED = Layout("striped", 48, 2)


def test_a_ring_sees_the_heads_that_tensor_ranks_and_ulysses_members_leave():
    q_BLhD, kv_2BLgD = ring_tensors(
        CONFIG, Grid(ring=2, ulysses=2, tensor=2), STRIPED, torch.bfloat16
    )
    assert q_BLhD.shape == (3, 24, 2, 8)
    assert kv_2BLgD.shape == (2, 3, 24, 1, 8)


def test_key_value_heads_fewer_than_members_are_repeated():
    _, kv_2BLgD = ring_tensors(CONFIG, Grid(ring=2, ulysses=4, tensor=2), STRIPED, torch.bfloat16)
    assert kv_2BLgD.shape == (2, 3, 24, 1, 8)  # 2 heads a tensor rank, 4 members: each head twice


def test_members_keep_their_own_share():
    tensors = ring_tensors(CONFIG, Grid(ring=2, ulysses=4), STRIPED, torch.float32)
    tokens, q, kv = 3 * 24, 2 * 8 * 4, 2 * 1 * 8 * 4
    assert ulysses_bytes(*tensors, 4) == (tokens * (q + kv) * 3 // 4, tokens * (q + 2 * 4) * 3 // 4)


def test_two_sums_over_tensor_ranks_are_two_scatters_and_two_gathers():
    assert tensor_bytes(1000, 2, gathers_again=0) == (4 * 500, 4 * 500)
    assert tensor_bytes(1000, 4, gathers_again=0) == (4 * 750, 4 * 750)


def test_an_input_that_is_gathered_again_costs_one_more_gather_in_backward():
    assert tensor_bytes(1000, 4, gathers_again=2) == (4 * 750, 6 * 750)


def test_a_stage_hands_on_the_stream_and_its_positions():
    assert stage_bytes(1000, 10, Grid(pipe=2, tensor=2), sequence_parallel=False) == (1160, 1000)
    assert stage_bytes(1000, 10, Grid(pipe=2, tensor=2), sequence_parallel=True) == (660, 500)
