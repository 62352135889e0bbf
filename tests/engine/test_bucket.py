"""DeepSpeed's bucket for gradients has as many elements as a process has parameters."""

import pytest

from megatron_ring.plan.memory_report import memory_of_stages
from megatron_ring.settings.deepspeed_config import (
    MAX_BUCKET_ELEMENTS,
    reduce_bucket_elements,
    with_bucket_size,
)
from tests.distributed import run_ranks
from tests.training import tiny

REQUESTED = {"zero_optimization": {"reduce_bucket_size": 1000}}
CASES = {
    "zero 1": {"training": {"zero_stage": 1}},
    "zero 2": {"training": {"zero_stage": 2}},
    "zero 3": {"training": {"zero_stage": 3}},
    "tensor": {"parallel": {"tensor_model_parallel_size": 2}},
    "stages, tied": {"parallel": {"pipeline_model_parallel_size": 2}},
    "stages, untied": {
        "parallel": {"pipeline_model_parallel_size": 2},
        "model": {"untie_embeddings_and_output_weights": True},
    },
    "requested": {"training": {"zero_stage": 2, "deepspeed": REQUESTED}},
}


def bucket_bytes(rank: int, world_size: int, prefix) -> dict[str, tuple[int, int]]:
    """Return the bytes of DeepSpeed's bucket in a step, and those that are planned, by case."""
    found = {}
    for name, sections in CASES.items():
        run = tiny.Run(tiny.config(**sections), prefix, rank, world_size)
        run.steps(1)
        optimizer = run.engine.engine.optimizer
        [bucket] = optimizer.ipg_buckets.values()
        # ZeRO 3 keeps one buffer; the other stages allocate theirs with the first gradient.
        buffer = bucket.buffer
        if not hasattr(buffer, "nbytes"):
            optimizer.setup_buckets()
            buffer = bucket.buffer[0]
        planned = memory_of_stages(run.setup, tiny.VOCAB)[run.at.pipe].bucket
        found[name] = (buffer.nbytes, planned)
    return found


def test_the_bucket_that_deepspeed_allocates_is_the_planned_one(tmp_path):
    for rank, of_rank in enumerate(run_ranks(2, bucket_bytes, tiny.write_store(tmp_path))):
        for name, (actual, planned) in of_rank.items():
            # The plan is that of the first tensor rank, which has one row more of 61.
            fewer = 4 * 32 if name == "tensor" and rank == 1 else 0
            assert actual == planned - fewer, name
        assert of_rank["requested"] == (4000, 4000)
        assert of_rank["zero 1"] == of_rank["zero 2"] == of_rank["zero 3"]
        assert of_rank["tensor"][0] < of_rank["zero 1"][0]


@pytest.mark.parametrize(
    ("parameters", "requested", "elements"),
    [
        (2_500_000, None, 2_500_000),
        (7 * 10**9, None, 500_000_000),
        (2_500_000, 10**9, 10**9),
        (7 * 10**9, 1000, 1000),
        (10, 5e8, 500_000_000),
    ],
)
def test_the_bucket_has_the_models_size_up_to_deepspeeds_default(parameters, requested, elements):
    assert reduce_bucket_elements(parameters, requested) == elements
    zero = {"stage": 2} | ({"reduce_bucket_size": requested} if requested else {})
    settings = with_bucket_size({"zero_optimization": zero, "other": 1}, parameters)
    assert settings == {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": elements},
        "other": 1,
    }


def test_the_upper_limit_is_deepspeeds_default():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig().reduce_bucket_size == MAX_BUCKET_ELEMENTS
