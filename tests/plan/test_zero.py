"""Bytes of a parameter, against what DeepSpeed 0.19.8 was seen to hold after a step on two processes."""

from dataclasses import replace

import pytest
import torch

from megatron_ring.plan.zero import Zero, model_states

COUNT = 1000
LEAN = Zero(ranks=2, reduce_bucket_size=0, max_live_parameters=0)


def lasting(dtype: torch.dtype, zero: Zero) -> float:
    """Bytes of a parameter that are on the device between steps: gradients are gone then, but for ZeRO 3."""
    states = model_states(COUNT, dtype, zero)
    gradients = states.gradients if zero.stage == 3 else 0
    return (states.parameters + states.optimizer + gradients) / COUNT


@pytest.mark.parametrize(
    ("dtype", "stage", "measured"),
    [
        (torch.float32, 0, 12), (torch.float32, 1, 10), (torch.float32, 2, 10), (torch.float32, 3, 10),
        (torch.bfloat16, 0, 14), (torch.bfloat16, 1, 8), (torch.bfloat16, 2, 8), (torch.bfloat16, 3, 8),
    ],
)  # fmt: skip
def test_what_lasts_is_what_deepspeed_was_seen_to_hold(dtype, stage, measured):
    assert lasting(dtype, replace(LEAN, stage=stage)) == measured


def test_more_ranks_split_the_state_the_gradients_and_the_parameters_in_turn():
    stages = [
        model_states(COUNT, torch.bfloat16, replace(LEAN, stage=stage, ranks=10))
        for stage in range(4)
    ]
    assert [states.optimizer for states in stages] == [12_000, 1200, 1200, 1200]
    assert [states.gradients for states in stages] == [2000, 2000, 200, 200]
    assert [states.parameters for states in stages] == [2000, 2000, 2000, 200]


def test_a_bucket_and_gathered_parameters_are_counted_as_deepspeed_has_them():
    zero = Zero(stage=3, ranks=2, reduce_bucket_size=70, max_live_parameters=300)
    assert model_states(COUNT, torch.bfloat16, zero).bucket == 70 * 4
    assert model_states(COUNT, torch.bfloat16, replace(zero, stage=2)).bucket == 70 * 2
    assert model_states(COUNT, torch.bfloat16, zero).parameters == 2 * (500 + 300)
    assert model_states(
        COUNT, torch.bfloat16, replace(zero, max_live_parameters=10**9)
    ).parameters == 2 * (500 + 1000)


def test_what_is_offloaded_leaves_the_device_for_the_host():
    zero = replace(LEAN, stage=3, offload_optimizer=True, offload_param=True)
    states = model_states(COUNT, torch.bfloat16, zero)
    assert (states.parameters, states.gradients, states.optimizer, states.update) == (0, 0, 0, 0)
    assert states.host == 500 * (12 + 2 + 4) + 500 * 2
