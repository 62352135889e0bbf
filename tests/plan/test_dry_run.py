"""The output of --dry-run, without processes and without data."""

import pytest
import torch

from megatron_ring.data.tokenizer_training import train_tokenizer
from megatron_ring.plan.dry_run import plan_lines
from megatron_ring.plan.memory import ERROR
from megatron_ring.plan.memory_report import ASSUMED_VOCAB_SIZE, human, memory_of_stages
from megatron_ring.plan.parameters import parameter_count
from megatron_ring.settings.run_settings import RunSettings
from megatron_ring.training import console
from megatron_ring.training.console import plan
from tests.training import tiny

EVERY_AXIS = {
    "pipeline_model_parallel_size": 2,
    "context_parallel_size": 4,
    "ulysses_degree": 2,
    "tensor_model_parallel_size": 2,
}


def printed(world_size: int, **sections: dict) -> str:
    return "\n".join(plan_lines(RunSettings.resolve(tiny.config(**sections), world_size)))


def test_every_rank_has_its_coordinates():
    output = printed(32, parallel=EVERY_AXIS, training={"zero_stage": 1, "global_batch_size": 16})
    header = " rank     pipe     data     ring  ulysses   tensor"
    assert f"{header}\n    0        0        0        0        0        0" in output
    assert "\n   31        1        1        1        1        1" in output


def test_the_drawing_states_how_ulysses_splits_a_shard():
    assert "Ulysses" not in printed(4)
    output = printed(4, parallel={"ulysses_degree": 2})
    assert "ring rank 1  .#.#" in output
    assert "each ring rank is 2 Ulysses members: of its 24 tokens" in output
    assert "member u holds the u-th run of 12" in output


def test_no_more_stripes_are_drawn_than_the_sample_has():
    output = printed(2, data={"seq_length": 8192})
    assert "drawn for 8192 tokens; # is a stripe of 2048 tokens" in output
    assert "ring rank 0  #..#" in output
    assert "ring rank 1  .##." in output


def test_memory_is_listed_by_stage_with_its_error_and_its_exact_peak():
    training = {"zero_stage": 1, "global_batch_size": 16}
    setup = RunSettings.resolve(tiny.config(parallel=EVERY_AXIS, training=training), 16)
    output = "\n".join(plan_lines(setup))
    first, last = memory_of_stages(setup, 4096)
    assert f"within {ERROR:.0%} of the measured" in output
    assert f"peak memory      {first.peak:,}, {last.peak:,} bytes by stage" in output
    for name in ("parameters", "gradients", "optimizer", "activations"):
        assert name in output
        assert human(getattr(first, name)) in output
    assert "2 micro-batches in flight on the first stage" in output
    assert "6 x hidden, bf16: 192" in output


def first_stage(world_size: int, **sections):
    return memory_of_stages(RunSettings.resolve(tiny.config(**sections), world_size), 61)[0]


def test_activations_shrink_with_recomputation_and_the_optimizer_with_zero():
    activations = [
        first_stage(4, memory={"recompute": mode}).activations
        for mode in ("none", "selective", "full")
    ]
    assert activations == sorted(activations, reverse=True)
    with_zero = first_stage(4, training={"zero_stage": 1})
    without = first_stage(4, training={"zero_stage": 0})
    assert with_zero.optimizer < without.optimizer


def test_keys_of_deepspeeds_config_enter_the_plan():
    small = {"zero_optimization": {"reduce_bucket_size": 1000}}
    default = first_stage(2, training={"zero_stage": 1, "deepspeed": {}}).bucket
    chosen = first_stage(2, training={"zero_stage": 1, "deepspeed": small}).bucket
    assert chosen == 4 * 1000
    parameters = parameter_count(tiny.config().model, 61, tiny.SEQ)
    assert default == 4 * parameters


@pytest.mark.parametrize(
    ("training", "line"),
    [
        ({"zero_stage": 1}, "{count:,} elements by stage: the parameters of a process"),
        (
            {"zero_stage": 3, "deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}}},
            "1,000 elements by stage: set by reduce_bucket_size",
        ),
        ({"zero_stage": 0}, ""),
    ],
)
def test_the_size_of_deepspeeds_bucket_is_listed_where_it_has_one(training, line):
    expected = line.format(count=parameter_count(tiny.config().model, 4096, tiny.SEQ))
    lines = [row for row in printed(2, training=training).splitlines() if row[:7] == "bucket "]
    assert len(lines) == bool(line)
    assert all(expected in row for row in lines)


def test_a_large_model_has_deepspeeds_largest_bucket():
    model = {"hidden_size": 4096, "num_layers": 32}
    assert f"{500_000_000:,} elements by stage" in printed(2, model=model)


def test_a_pipeline_in_bfloat16_shards_its_optimizer_even_without_zero():
    def optimizer(**parallel):
        training = {"zero_stage": 0, "dtype": "bf16"}
        return first_stage(4, training=training, parallel=parallel).optimizer

    assert optimizer(pipeline_model_parallel_size=2) < optimizer() / 2


def test_bytes_of_every_exchange_are_listed():
    training = {"global_batch_size": 16, "micro_batch_size": 2}
    output = printed(16, parallel=EVERY_AXIS, training=training)
    tokens = 2 * 12  # l = 48 / 2 ring / 2 ulysses
    stream = tokens * 32 * 4  # E = 32
    q = tokens * 2 * 8 * 4  # 2 of 4 query heads
    kv = tokens * 2 * 2 * 8 * 4  # 1 of 2 key-value heads, twice for Ulysses
    assert f"bytes of a hop   {kv:,} forward (K and V)" in output
    assert f"bytes of Ulysses {(q + kv) // 2:,} before attention" in output
    both = f"{2 * stream:,} in a layer's forward, {2 * stream:,} in its backward"
    assert f"bytes of tensor  {both}" in output
    sent = f"{stream + 16 * tokens:,} forward to the next one for a micro-batch"
    assert f"bytes of a stage {sent}, {stream:,} back" in output
    assert (
        "bubble           a stage is idle for 11.1% of a step: 2 stages, 8 micro-batches" in output
    )


@pytest.mark.parametrize(
    ("world_size", "seq_length", "balance"),
    [
        (2048, 4096, "slowest rank over mean 1.4996"),
        (2, 2**30, "balance not counted for more than 134,217,728 tokens"),
    ],
)
def test_balance_is_counted_once_a_token_whatever_the_ring_size(world_size, seq_length, balance):
    # Once for each pair of ranks would take minutes here.
    output = printed(world_size, parallel={"stripe_size": 1}, data={"seq_length": seq_length})
    assert balance in output


def test_one_process_lists_no_exchange():
    output = printed(1)
    for word in ("bytes of", "bubble", "layout"):
        assert word not in output


def test_the_vocabulary_is_that_of_the_default_text_or_the_tokenizer_or_assumed(tmp_path):
    assert "for 4,096 token ids (the tokenizer of the default text)" in printed(1)
    data = {"data_path": (str(tmp_path / "nothing"),)}
    without_tokenizer = printed(1, data=data)
    assert f"for {ASSUMED_VOCAB_SIZE:,} token ids (assumed" in without_tokenizer
    assert f"{tmp_path}/tokenizer.model" in without_tokenizer
    tokenizer = train_tokenizer(["some words to train on, and some more"], 280)
    tokenizer.save(tmp_path / "tokenizer.model")
    assert f"for 280 token ids (from {tmp_path}/tokenizer.model)" in printed(1, data=data)


def test_a_store_that_a_run_would_not_find_has_a_line_and_the_plan_is_made(tmp_path):
    present, absent = tmp_path / "present", tmp_path / "absent"
    for suffix in ("bin", "idx"):
        present.with_suffix(f".{suffix}").touch()
    output = printed(1, data={"data_path": ("0.5", str(present), "0.5", str(absent))})
    [line] = [line for line in output.splitlines() if line.startswith("data ")]
    assert f"no token store {absent}: no {absent}.bin and no {absent}.idx." in line
    assert "exit code 3" in line
    assert "peak memory " in output
    absent.with_suffix(".idx").touch()
    output = printed(1, data={"data_path": (str(absent),)})
    assert f"no {absent}.bin. " in output
    assert "\ndata " not in printed(1, data={"data_path": (str(present),)})
    assert "\ndata " not in printed(1)


def test_the_work_of_packed_documents_is_stated_to_be_that_of_one_document():
    def work(**data) -> str:
        [line] = [x for x in printed(4, data=data).splitlines() if x.startswith("work ")]
        return line

    assert work().endswith("counted in visible pairs")
    assert "as if a sample were one document" in work(reset_attention_mask=True)


@pytest.mark.parametrize(
    ("count", "formatted"), [(0, "-"), (5, "5 B"), (2048, "2.00 KiB"), (3 * 2**30, "3.00 GiB")]
)
def test_bytes_are_formatted_in_binary_units(count, formatted):
    assert human(count) == formatted


def test_a_plan_starts_no_processes():
    plan(RunSettings.resolve(tiny.config(), 4))
    assert not torch.distributed.is_initialized()


def test_the_keys_travel_with_a_reduction_that_is_the_same_for_every_ring():
    model = {"num_query_groups": 4}
    parallel = {"stripe_size": 1}
    assert " backward (the queries travel; " in printed(4, model=model, parallel=parallel)
    invariant = parallel | {"context_parallel_reduction": "invariant"}
    assert " backward (the keys travel; " in printed(4, model=model, parallel=invariant)


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
def test_a_converted_value_is_listed_once(sections, line):
    assert (
        console.plan(RunSettings.resolve(tiny.config(**sections), 1)).splitlines().count(line) == 1
    )
    assert f"\n{line[:17]}" not in console.plan(RunSettings.resolve(tiny.config(), 1))


@pytest.mark.parametrize(
    ("training", "line"),
    [
        ({"lr_warmup_iters": 4}, "4 steps: set by --lr-warmup-iters"),
        (
            {"lr_warmup_iters": "auto", "train_iters": 70},
            "7 steps: auto: a tenth of the schedule's 70 steps, at most 20",
        ),
    ],
)
def test_the_warm_up_is_listed_and_the_printed_config_keeps_auto(training, line):
    output = console.plan(RunSettings.resolve(tiny.config(training=training), 1))
    assert f"warm-up          {line}" in output.splitlines()
    assert f"  lr_warmup_iters: {training['lr_warmup_iters']}\n" in output


def test_placed_documents_are_stated_in_the_layout():
    placed = {"document_placement": "auto"}
    data = {"reset_attention_mask": True}
    assert "blocks of 128 tokens" in printed(2, parallel=placed, data=data)
    assert "blocks of 128" not in printed(2, data=data)
