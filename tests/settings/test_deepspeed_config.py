"""DeepSpeed's config is derived from our options; extra keys may add to it, not contradict it."""

import math
from pathlib import Path

import pytest
import torch

from megatron_ring.errors import ConfigError
from megatron_ring.settings.run_settings import RunSettings
from tests.distributed import run_ranks
from tests.training import tiny


def derived(world_size: int = 4, **sections) -> dict:
    return RunSettings.resolve(tiny.config(**sections), world_size).deepspeed


def test_batch_sizes_count_context_ranks_as_data_ranks_as_deepspeed_does():
    sizes = derived(
        parallel={"context_parallel_size": 2},
        training={"global_batch_size": 12, "micro_batch_size": 3},
    )
    assert sizes["train_micro_batch_size_per_gpu"] == 3
    assert sizes["gradient_accumulation_steps"] == 2
    assert sizes["train_batch_size"] == 3 * 2 * 4


def test_extra_keys_are_merged_section_by_section():
    extras = {"zero_optimization": {"overlap_comm": True}, "prescale_gradients": False}
    merged = derived(training={"zero_stage": 2, "deepspeed": extras})
    assert merged["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert merged["prescale_gradients"] is False


def test_an_extra_key_equal_to_the_derived_one_is_accepted():
    merged = derived(training={"deepspeed": {"zero_optimization": {"stage": 1}}})
    assert merged["zero_optimization"] == {"stage": 1}


def test_every_contradicting_extra_key_is_refused_with_the_flag_to_set():
    extras = {
        "train_batch_size": 7,
        "zero_optimization": {"stage": 3},
        "communication_data_type": "bf16",
    }
    with pytest.raises(ConfigError) as raised:
        derived(training={"deepspeed": extras})
    batch, stage, dtype = raised.value.problems
    assert_contradiction(batch, "train_batch_size 7", "16", "--global-batch-size")
    assert_contradiction(stage, "zero_optimization.stage 3", "1", "--zero-stage")
    assert_contradiction(dtype, "communication_data_type 'bf16'", "'fp32'", "fixed")


def assert_contradiction(problem: str, extra: str, derived_value: str, remedy: str) -> None:
    assert problem.startswith(f"deepspeed: {extra} ")
    assert f"derived {derived_value}." in problem
    assert remedy in problem


@pytest.mark.parametrize("size", [5e8, "5e8", "5.0E+8", 500_000_000])
def test_a_number_with_an_exponent_is_a_number(size):
    extras = {"zero_optimization": {"reduce_bucket_size": size}}
    merged = derived(training={"deepspeed": extras})
    assert merged["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert isinstance(merged["zero_optimization"]["reduce_bucket_size"], int)


@pytest.mark.parametrize("size", ["abc", -5, 0, True, [1], None, 0.5, math.inf, math.nan, 10**13])
def test_a_bucket_size_that_is_no_positive_whole_number_is_refused(size):
    extras = {"zero_optimization": {"reduce_bucket_size": size}}
    with pytest.raises(ConfigError, match="reduce_bucket_size .* from 1 to 1000000000000"):
        derived(training={"deepspeed": extras})


def test_offload_options_become_deepspeed_keys_that_may_be_tuned():
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
    ("extras", "name", "remedy"),
    [
        (
            {"optimizer": {"type": "Lamb"}},
            "optimizer",
            "--lr, --weight-decay, --adam-beta1, --adam-beta2 or --adam-eps",
        ),
        ({"scheduler": {}}, "scheduler", "--lr, --min-lr, --lr-warmup-iters or --lr-decay-style"),
        (
            {"tensor_parallel": {"autotp_size": 2}},
            "tensor_parallel",
            "--tensor-model-parallel-size",
        ),
        (
            {"sequence_parallel_size": 2},
            "sequence_parallel_size",
            "--context-parallel-size or --ulysses-degree",
        ),
        ({"pipeline": {"stages": 2}}, "pipeline.stages", "--pipeline-model-parallel-size"),
        (
            {"pipeline": {"activation_checkpoint_interval": 1}},
            "pipeline.activation_checkpoint_interval",
            "--recompute",
        ),
        (
            {"activation_checkpointing": {}},
            "activation_checkpointing",
            "--recompute or --offload-activations",
        ),
        ({"elasticity": {"enabled": True}}, "elasticity", "--global-batch-size"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast", "--dtype"),
        ({"amp": {"enabled": True}}, "amp", "--dtype"),
        ({"bfloat16": {"enabled": True}}, "bfloat16", "--dtype"),
        ({"curriculum_learning": {}}, "curriculum_learning", "--seq-length"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer",
            "--offload-optimizer",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param",
            "--offload-param",
        ),
        (
            {"gradient_allreduce_op": "sum"},
            "gradient_allreduce_op 'sum'",
            "the derived 'mean'. It is fixed.",
        ),
        (
            {"managed_gradient_accumulation": False},
            "managed_gradient_accumulation False",
            "the derived True. It is fixed.",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_extra_key_that_other_options_determine_is_refused_with_their_flags(
    extras, name, remedy
):
    with pytest.raises(ConfigError) as raised:
        derived(training={"deepspeed": extras})
    [problem] = raised.value.problems
    assert problem.startswith(f"deepspeed: {name} ")
    assert remedy in problem


def test_an_offload_device_that_contradicts_the_option_is_refused():
    extras = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
    with pytest.raises(ConfigError) as raised:
        derived(training={"deepspeed": extras}, memory={"offload_optimizer": "cpu"})
    [problem] = raised.value.problems
    name = "zero_optimization.offload_optimizer.device 'nvme'"
    assert_contradiction(problem, name, "'cpu'", "--offload-optimizer")


OPTIMIZER = {"offload_optimizer": "cpu"}
PARAM = {"offload_param": "cpu"}
OFFLOADED = [(1, OPTIMIZER), (2, OPTIMIZER), (3, OPTIMIZER), (3, PARAM), (3, OPTIMIZER | PARAM)]


def train_offloaded(rank: int, world_size: int, prefix: Path) -> list[list[tuple[float, float]]]:
    """Train eight steps of two micro-batches for each of OFFLOADED; returns losses and norms."""
    results = []
    for stage, memory in OFFLOADED:
        training = {"zero_stage": stage, "micro_batch_size": 2}
        run = tiny.Run(tiny.config(training=training, memory=memory), prefix, rank, world_size)
        zero = run.engine.engine
        assert zero.zero_cpu_offload() == ("offload_optimizer" in memory)
        assert (zero.zero_offload_param() is not None) == ("offload_param" in memory)
        results.append(run.steps(8))
    return results


def train_without_offload(rank: int, world_size: int, prefix: Path) -> list[tuple[float, float]]:
    return tiny.Run(tiny.config(training={"zero_stage": 0}), prefix, rank, world_size).steps(8)


def test_training_with_offload_equals_training_without(tmp_path):
    prefix = tiny.write_store(tmp_path)
    [expected] = run_ranks(1, train_without_offload, prefix)
    for world_size in (1, 2):
        for of_rank in run_ranks(world_size, train_offloaded, prefix):
            for steps in of_rank:
                torch.testing.assert_close(
                    torch.tensor(steps, dtype=torch.float64),
                    torch.tensor(expected).double(),
                    rtol=1e-5,
                    atol=0,
                )
