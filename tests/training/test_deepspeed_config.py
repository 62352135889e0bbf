"""DeepSpeed's dictionary follows from our options; a user's extras may add to it and not contradict it."""

import pytest

from megatron_ring.errors import ConfigError
from megatron_ring.training.setup import Setup
from tests.training import tiny


def derived(world_size: int = 4, **sections) -> dict:
    return Setup.of(tiny.config(**sections), world_size).deepspeed


def test_sizes_are_in_deepspeeds_terms_where_context_ranks_are_data_ranks():
    sizes = derived(parallel={"context_parallel_size": 2}, training={"global_batch_size": 12, "micro_batch_size": 3})
    assert sizes["train_micro_batch_size_per_gpu"] == 3
    assert sizes["gradient_accumulation_steps"] == 2
    assert sizes["train_batch_size"] == 3 * 2 * 4


def test_extras_are_merged_section_by_section():
    extras = {"zero_optimization": {"overlap_comm": True}, "prescale_gradients": False}
    merged = derived(training={"zero_stage": 2, "deepspeed": extras})
    assert merged["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert merged["prescale_gradients"] is False


def test_an_extra_that_agrees_is_no_contradiction():
    assert derived(training={"deepspeed": {"zero_optimization": {"stage": 1}}})["zero_optimization"] == {"stage": 1}


def test_every_extra_that_contradicts_names_the_flag_to_set_instead():
    extras = {"train_batch_size": 7, "zero_optimization": {"stage": 3}, "communication_data_type": "bf16"}
    with pytest.raises(ConfigError) as refused:
        derived(training={"deepspeed": extras})
    assert refused.value.problems == [
        "deepspeed: train_batch_size 7 contradicts the derived 16. Set --global-batch-size instead.",
        "deepspeed: zero_optimization.stage 3 contradicts the derived 1. Set --zero-stage instead.",
        "deepspeed: communication_data_type 'bf16' contradicts the derived 'fp32'. It is fixed.",
    ]
