"""What --dry-run prints, without processes and without data."""

import pytest
import torch

from megatron_ring.data.tokenizer_training import train_tokenizer
from megatron_ring.plan.dry_run import plan_lines
from megatron_ring.plan.memory import ERROR
from megatron_ring.plan.memory_report import ASSUMED_VOCAB_SIZE, human, memory_of_stages
from megatron_ring.settings.setup import Setup
from megatron_ring.training import console
from megatron_ring.training.console import plan
from tests.training import tiny

EVERY_AXIS = {
    "pipeline_model_parallel_size": 2,
    "context_parallel_size": 4,
    "ulysses_degree": 2,
    "tensor_model_parallel_size": 2,
}


def told(world_size: int, **sections: dict) -> str:
    return "\n".join(plan_lines(Setup.of(tiny.config(**sections), world_size)))


def test_every_rank_has_its_coordinates():
    said = told(32, parallel=EVERY_AXIS, training={"zero_stage": 1, "global_batch_size": 16})
    assert (
        " rank     pipe     data     ring  ulysses   tensor\n    0        0        0        0        0        0"
        in said
    )
    assert "\n   31        1        1        1        1        1" in said


def test_the_picture_says_how_ulysses_cuts_a_shard():
    assert "Ulysses" not in told(4)
    said = told(4, parallel={"ulysses_degree": 2})
    assert "ring rank 1  .#.#" in said
    assert "each ring rank is 2 Ulysses members: of its 24 tokens" in said
    assert "member u has the u-th run of 12" in said


def test_memory_is_told_by_stage_with_its_error_and_its_exact_peak():
    setup = Setup.of(
        tiny.config(parallel=EVERY_AXIS, training={"zero_stage": 1, "global_batch_size": 16}), 16
    )
    said = "\n".join(plan_lines(setup))
    first, last = memory_of_stages(setup, 4096)
    assert f"within {ERROR:.0%} of what is measured" in said
    assert f"peak             {first.peak:,}, {last.peak:,} bytes by stage" in said
    for name in ("parameters", "gradients", "optimizer", "activations"):
        assert name in said
        assert human(getattr(first, name)) in said
    assert "2 micro-batches in flight on the first stage" in said
    assert "6 x hidden, bf16: 192" in said


def test_activations_shrink_with_recomputation_and_the_optimizer_with_zero():
    def planned(**sections):
        return memory_of_stages(Setup.of(tiny.config(**sections), 4), 61)[0]

    modes = [
        planned(memory={"recompute": mode}).activations for mode in ("none", "selective", "full")
    ]
    assert modes == sorted(modes, reverse=True)
    assert (
        planned(training={"zero_stage": 1}).optimizer
        < planned(training={"zero_stage": 0}).optimizer
    )


def test_deepspeeds_own_keys_are_planned_with():
    small = {"zero_optimization": {"reduce_bucket_size": 1000}}
    default, chosen = (
        memory_of_stages(
            Setup.of(tiny.config(training={"zero_stage": 1, "deepspeed": extra}), 2), 61
        )[0].bucket
        for extra in ({}, small)
    )
    assert default - chosen == 4 * (500_000_000 - 1000)


def test_a_pipeline_in_bfloat16_splits_its_optimizer_even_without_zero():
    def optimizer(**parallel):
        training = {"zero_stage": 0, "dtype": "bf16"}
        return memory_of_stages(Setup.of(tiny.config(training=training, parallel=parallel), 4), 61)[
            0
        ].optimizer

    assert optimizer(pipeline_model_parallel_size=2) < optimizer() / 2


def test_bytes_of_every_exchange_are_told():
    training = {"global_batch_size": 16, "micro_batch_size": 2}
    said = told(16, parallel=EVERY_AXIS, training=training)
    tokens, stream = 2 * 12, 2 * 12 * 32 * 4  # l = 48 / 2 ring / 2 ulysses, E = 32
    q, kv = (
        tokens * 2 * 8 * 4,
        tokens * 2 * 2 * 8 * 4,
    )  # 2 of 4 query heads; 1 of 2 key-value heads, twice for Ulysses
    assert f"bytes of a hop   {kv:,} forward (K and V)" in said
    assert f"bytes of Ulysses {(q + kv) // 2:,} before attention" in said
    assert (
        f"bytes of tensor  {2 * stream:,} in a layer's forward, {2 * stream:,} in its backward"
        in said
    )
    assert (
        f"bytes of a stage {stream + 16 * tokens:,} forward to the next one for a micro-batch, {stream:,} back"
        in said
    )
    assert "bubble           11.1% of a step a stage waits: 2 stages, 8 micro-batches" in said


def test_what_one_process_would_not_send_is_not_told():
    said = told(1)
    for word in ("bytes of", "bubble", "layout"):
        assert word not in said


def test_the_vocabulary_is_the_default_texts_the_tokenizers_or_assumed(tmp_path):
    assert "for 4,096 token ids, which the tokenizer of the default text has" in told(1)
    missing = told(1, data={"data_path": (str(tmp_path / "nothing"),)})
    assert (
        f"for {ASSUMED_VOCAB_SIZE:,} token ids, assumed, as {tmp_path}/tokenizer.model cannot be read"
        in missing
    )
    train_tokenizer(["some words to train on, and some more"], 280).save(
        tmp_path / "tokenizer.model"
    )
    found = told(1, data={"data_path": (str(tmp_path / "nothing"),)})
    assert f"for 280 token ids, by {tmp_path}/tokenizer.model" in found


@pytest.mark.parametrize(
    ("count", "said"), [(0, "-"), (5, "5 B"), (2048, "2.00 KiB"), (3 * 2**30, "3.00 GiB")]
)
def test_bytes_in_human_units(count, said):
    assert human(count) == said


def test_nothing_is_started():
    plan(Setup.of(tiny.config(), 4))
    assert not torch.distributed.is_initialized()


def test_the_keys_travel_where_sums_are_the_same_for_every_ring():
    model, parallel = {"num_query_groups": 4}, {"stripe_size": 1}
    assert "backward (the queries travel; " in told(4, model=model, parallel=parallel)
    by_blocks = parallel | {"context_parallel_reduction": "invariant"}
    assert "backward (the keys travel; " in told(4, model=model, parallel=by_blocks)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (
            {"data": {"split": (969, 30, 1)}},
            "split            969, 30, 1 adds up to 1000: shares of 0.969, 0.03, 0.001",
        ),
        (
            {"model": {"window_size": 9}},
            "window           9 keys: a token and the 8 before it (8,0 in Megatron)",
        ),
    ],
)
def test_what_was_converted_is_told_once(sections, line):
    assert console.plan(Setup.of(tiny.config(**sections), 1)).splitlines().count(line) == 1
    assert f"\n{line[:17]}" not in console.plan(Setup.of(tiny.config(), 1))
