"""DeepSpeed's dictionary follows from our options; a user's extras may add to it and not contradict it."""

from pathlib import Path

import pytest
import torch

from megatron_ring.errors import ConfigError
from megatron_ring.settings.setup import Setup
from tests.distributed import run_ranks
from tests.training import tiny


def derived(world_size: int = 4, **sections) -> dict:
    return Setup.of(tiny.config(**sections), world_size).deepspeed


def test_sizes_are_in_deepspeeds_terms_where_context_ranks_are_data_ranks():
    sizes = derived(
        parallel={"context_parallel_size": 2},
        training={"global_batch_size": 12, "micro_batch_size": 3},
    )
    assert sizes["train_micro_batch_size_per_gpu"] == 3
    assert sizes["gradient_accumulation_steps"] == 2
    assert sizes["train_batch_size"] == 3 * 2 * 4


def test_extras_are_merged_section_by_section():
    extras = {"zero_optimization": {"overlap_comm": True}, "prescale_gradients": False}
    merged = derived(training={"zero_stage": 2, "deepspeed": extras})
    assert merged["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert merged["prescale_gradients"] is False


def test_an_extra_that_agrees_is_no_contradiction():
    assert derived(training={"deepspeed": {"zero_optimization": {"stage": 1}}})[
        "zero_optimization"
    ] == {"stage": 1}


def test_every_extra_that_contradicts_names_the_flag_to_set_instead():
    extras = {
        "train_batch_size": 7,
        "zero_optimization": {"stage": 3},
        "communication_data_type": "bf16",
    }
    with pytest.raises(ConfigError) as refused:
        derived(training={"deepspeed": extras})
    assert refused.value.problems == [
        "deepspeed: train_batch_size 7 contradicts the derived 16. Set --global-batch-size instead.",
        "deepspeed: zero_optimization.stage 3 contradicts the derived 1. Set --zero-stage instead.",
        "deepspeed: communication_data_type 'bf16' contradicts the derived 'fp32'. It is fixed.",
    ]


def test_what_is_kept_in_cpu_memory_is_told_deepspeed_and_may_be_tuned():
    both = {"offload_optimizer": "cpu", "offload_param": "cpu"}
    tuned = {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}
    merged = derived(training={"zero_stage": 3, "deepspeed": tuned}, memory=both)
    assert merged["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "ratio": 0.5},
        "offload_param": {"device": "cpu"},
    }
    assert merged["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("extras", "said"),
    [
        (
            {"optimizer": {"type": "Lamb"}},
            "optimizer is not set by hand. Set --lr, --weight-decay, --adam-beta1,",
        ),
        (
            {"scheduler": {}},
            "scheduler is not set by hand. Set --lr, --min-lr, --lr-warmup-iters or --lr-decay-style",
        ),
        (
            {"tensor_parallel": {"autotp_size": 2}},
            "tensor_parallel is not set by hand. Set --tensor-model-parallel-s",
        ),
        (
            {"sequence_parallel_size": 2},
            "sequence_parallel_size is not set by hand. Set --context-parallel-size or ",
        ),
        (
            {"pipeline": {"stages": 2}},
            "pipeline.stages is not set by hand. Set --pipeline-model-parallel-size instead.",
        ),
        (
            {"pipeline": {"activation_checkpoint_interval": 1}},
            "pipeline.activation_checkpoint_interval is not set by hand. Set --recompute instead.",
        ),
        (
            {"activation_checkpointing": {}},
            "activation_checkpointing is not set by hand. Set --recompute or --offload",
        ),
        (
            {"elasticity": {"enabled": True}},
            "elasticity is not set by hand. Set --global-batch-size instead.",
        ),
        (
            {"torch_autocast": {"enabled": True}},
            "torch_autocast is not set by hand. Set --dtype instead.",
        ),
        ({"amp": {"enabled": True}}, "amp is not set by hand. Set --dtype instead."),
        (
            {"curriculum_learning": {}},
            "curriculum_learning is not set by hand. Set --seq-length instead.",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer is not set by hand. Set --offload-optimizer instead.",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param is not set by hand. Set --offload-param instead.",
        ),
        (
            {"gradient_allreduce_op": "sum"},
            "gradient_allreduce_op 'sum' contradicts the derived 'mean'. It is fixed.",
        ),
        (
            {"managed_gradient_accumulation": False},
            "managed_gradient_accumulation False contradicts the derived True. It is fixed.",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_extra_that_a_flag_settles_names_the_flag(extras, said):
    with pytest.raises(ConfigError) as refused:
        derived(training={"deepspeed": extras})
    assert [problem.startswith(f"deepspeed: {said}") for problem in refused.value.problems] == [
        True
    ]


def test_another_place_than_the_one_asked_for_contradicts_it():
    extras = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
    with pytest.raises(ConfigError) as refused:
        derived(training={"deepspeed": extras}, memory={"offload_optimizer": "cpu"})
    assert refused.value.problems == [
        "deepspeed: zero_optimization.offload_optimizer.device 'nvme' contradicts the derived 'cpu'. "
        "Set --offload-optimizer instead."
    ]


OPTIMIZER, PARAM = {"offload_optimizer": "cpu"}, {"offload_param": "cpu"}
OFFLOADED = [(1, OPTIMIZER), (2, OPTIMIZER), (3, OPTIMIZER), (3, PARAM), (3, OPTIMIZER | PARAM)]


def train_offloaded(rank: int, world_size: int, prefix: Path) -> list[list[tuple[float, float]]]:
    """Eight steps of two micro-batches for each of OFFLOADED."""
    found = []
    for stage, memory in OFFLOADED:
        training = {"zero_stage": stage, "micro_batch_size": 2}
        run = tiny.Run(tiny.config(training=training, memory=memory), prefix, rank, world_size)
        zero = run.engine.engine
        assert zero.zero_cpu_offload() == ("offload_optimizer" in memory)
        assert (zero.zero_offload_param() is not None) == ("offload_param" in memory)
        found.append(run.steps(8))
    return found


def train_at_home(rank: int, world_size: int, prefix: Path) -> list[tuple[float, float]]:
    return tiny.Run(tiny.config(training={"zero_stage": 0}), prefix, rank, world_size).steps(8)


def test_what_lies_in_cpu_memory_trains_alike(tmp_path):
    prefix = tiny.write_store(tmp_path)
    (at_home,) = run_ranks(1, train_at_home, prefix)
    for world_size in (1, 2):
        for of_rank in run_ranks(world_size, train_offloaded, prefix):
            for found in of_rank:
                torch.testing.assert_close(
                    torch.tensor(found, dtype=torch.float64),
                    torch.tensor(at_home).double(),
                    rtol=1e-5,
                    atol=0,
                )
