"""Illegal combinations are refused by their rule before a start; legal ones divide evenly."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pretrain_gpt
from megatron_ring.config import Config
from megatron_ring.errors import ConfigError
from megatron_ring.parallel.entry_point import report_once
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.grid import Grid
from megatron_ring.settings import rules
from megatron_ring.settings.run_settings import RunSettings
from megatron_ring.training.entry import parse_arguments
from megatron_ring.training.stopping import Stopping
from tests.forked import Forked
from tests.limited import limited
from tests.training import tiny

ROOT = Path(__file__).parents[2]


def problems(config: Config, world_size: int) -> list[str]:
    try:
        setup = RunSettings.resolve(config, world_size)
    except ConfigError as error:
        return error.problems
    assert setup.grid.world_size == world_size
    return []


def tensor(size: int, **more) -> dict:
    return {"tensor_model_parallel_size": size, **more}


def pipe(size: int) -> dict:
    return {"pipeline_model_parallel_size": size}


PLACED = {"document_placement": "auto"}
SEPARATED = {"reset_attention_mask": True}

# Name -> processes, changes to the tiny config (4 heads in 2 groups, hidden size 32, 2 layers, 48
# tokens), parts of the only problem, and the flags of its remedy.
REFUSED = {
    "heads over tensor ranks": (
        6,
        {"parallel": tensor(3), "model": {"num_query_groups": 0, "ffn_hidden_size": 96}},
        [
            "num_attention_heads 4 must be a multiple of 3",
            "(tensor_model_parallel_size 3 x ulysses_degree 1)",
            "Nearest: 3, 6;",
            "with 4 heads the product may be 1, 2, 4.",
        ],
        ["--num-attention-heads", "--tensor-model-parallel-size", "--ulysses-degree"],
    ),
    "heads over tensor and Ulysses ranks": (
        16,
        {"parallel": tensor(2, ulysses_degree=4)},
        [
            "num_attention_heads 4 must be a multiple of 8",
            "(tensor_model_parallel_size 2 x ulysses_degree 4)",
            "Nearest: 8;",
            "with 4 heads the product may be 1, 2, 4.",
        ],
        ["--num-attention-heads", "--tensor-model-parallel-size", "--ulysses-degree"],
    ),
    "key-value heads over tensor ranks": (
        4,
        {"parallel": tensor(4)},
        ["num_query_groups 2 must be a multiple of tensor_model_parallel_size 4"],
        ["--tensor-model-parallel-size (legal: 1, 2)", "--num-query-groups (legal: 4)"],
    ),
    "feed-forward over tensor ranks": (
        2,
        {"parallel": tensor(2), "model": {"ffn_hidden_size": 99}},
        [
            "ffn_hidden_size 99 must be a multiple of tensor_model_parallel_size 2",
            "Nearest: 98, 100.",
        ],
        ["--ffn-hidden-size", "--tensor-model-parallel-size"],
    ),
    "invariant blocks in the zigzag layout": (
        4,
        {
            "parallel": {
                "context_parallel_reduction": "invariant",
                "context_parallel": "zigzag",
                "stripe_size": 1,
            }
        },
        [
            "context_parallel_reduction invariant",
            "8 blocks",
            "context_parallel is zigzag with stripe_size 1 on 4 ring ranks",
            "Legal: striped with stripe_size 1 on 1, 2, 4, 8 ring ranks.",
        ],
        [
            "--context-parallel striped",
            "--stripe-size 1",
            "--context-parallel-size",
            "--context-parallel-reduction arrival",
        ],
    ),
    "invariant blocks of unequal length": (
        4,
        {
            "parallel": {"context_parallel_reduction": "invariant", "stripe_size": 1},
            "data": {"seq_length": 44},
        },
        ["seq_length 44 must be a multiple of 8", "Nearest: 40, 48."],
        ["--seq-length", "--context-parallel-reduction arrival"],
    ),
    "sequence parallelism without tensor ranks": (
        2,
        {"parallel": {"sequence_parallel": True}},
        ["sequence_parallel has no effect while tensor_model_parallel_size is 1."],
        ["--tensor-model-parallel-size", "--sequence-parallel"],
    ),
    "more stages than layers": (
        4,
        {"parallel": pipe(4)},
        ["num_layers 2 ", "pipeline_model_parallel_size 4"],
        ["--num-layers to at least 4", "--pipeline-model-parallel-size to at most 2"],
    ),
    "a batch that data ranks cannot share": (
        4,
        {
            "parallel": {"context_parallel": "none"},
            "training": {"global_batch_size": 6, "micro_batch_size": 1},
        },
        [
            "global_batch_size 6 must be a multiple of 4",
            "(micro_batch_size 1 x 4 data ranks)",
            "Nearest: 4, 8.",
        ],
        ["--global-batch-size"],
    ),
    "more chunks than tokens": (
        4,
        {"parallel": tensor(2, sequence_parallel=True), "memory": {"mlp_chunks": 13}},
        ["mlp_chunks 13 is more than the 12 tokens"],
        ["--mlp-chunks to at most 12"],
    ),
    "ZeRO 2 in a pipeline": (
        2,
        {"parallel": pipe(2), "training": {"zero_stage": 2}},
        ["zero_stage 2 ", "pipeline_model_parallel_size 2", "Legal: 0, 1."],
        ["--zero-stage 1", "--pipeline-model-parallel-size 1"],
    ),
    "optimizer offload without ZeRO": (
        2,
        {"training": {"zero_stage": 0}, "memory": {"offload_optimizer": "cpu"}},
        ["offload_optimizer cpu ", "zero_stage 0", "Legal: 1, 2, 3."],
        ["--zero-stage 1", "--offload-optimizer none"],
    ),
    "parameter offload with ZeRO 2": (
        2,
        {"training": {"zero_stage": 2}, "memory": {"offload_param": "cpu"}},
        ["offload_param cpu ", "zero_stage is 2", "Legal: 3."],
        ["--zero-stage 3", "--offload-param none"],
    ),
    "parameter offload in a pipeline": (
        2,
        {"parallel": pipe(2), "memory": {"offload_param": "cpu"}},
        ["offload_param cpu needs zero_stage 3"],
        ["--offload-param none", "--pipeline-model-parallel-size 1", "--zero-stage 3"],
    ),
    "half precision over tensor ranks without ZeRO": (
        2,
        {"parallel": tensor(2), "training": {"zero_stage": 0, "dtype": "bf16"}},
        ["zero_stage 0 in bf16 ", "2 processes", "2 tensor x 1 pipeline ranks."],
        ["--zero-stage 1", "--dtype fp32"],
    ),
    "roll back without checkpoints": (
        1,
        {"guards": {"on_bad_step": "roll-back"}},
        ["on_bad_step roll-back ", "save_interval is 0", "save empty."],
        ["--save", "--save-interval", "--on-bad-step skip"],
    ),
    "fp16 on a CPU": (
        1,
        {"training": {"dtype": "fp16"}},
        ["dtype fp16 ", "CPU"],
        ["--dtype auto, fp32 or bf16"],
    ),
    "activations offloaded from a CPU": (
        1,
        {"memory": {"offload_activations": True}},
        ["offload_activations ", "CPU"],
        ["--offload-activations"],
    ),
    "a shard that Ulysses ranks cannot share": (
        4,
        {"parallel": {"context_parallel": "ring", "ulysses_degree": 2}, "data": {"seq_length": 46}},
        ["seq_length 46 ", "2 ring ranks", "2 Ulysses ranks", "multiple of 4", "Nearest: 44, 48."],
        ["--seq-length"],
    ),
    "tokens that tensor ranks cannot share": (
        8,
        {
            "parallel": tensor(
                2, sequence_parallel=True, context_parallel="zigzag", ulysses_degree=2
            ),
            "data": {"seq_length": 44},
        },
        [
            "seq_length 44 must be a multiple of 8",
            "zigzag",
            "8 equal parts (2 ring x 2 Ulysses x 2 tensor ranks, by sequence_parallel)",
            "Nearest: 40, 48.",
        ],
        ["--seq-length", "--context-parallel striped", "--stripe-size 1", "--sequence-parallel"],
    ),
    "placed documents of another layout": (
        2,
        {"parallel": PLACED | {"context_parallel": "zigzag"}, "data": SEPARATED},
        ["document_placement auto", "striped", "context_parallel is zigzag"],
        ["--context-parallel", "--document-placement"],
    ),
    "placed documents that are one": (
        2,
        {"parallel": PLACED},
        ["document_placement auto", "reset_attention_mask is off"],
        ["--reset-attention-mask", "--document-placement"],
    ),
    "placed documents in the order of a fixed reduction": (
        2,
        {"parallel": PLACED | {"context_parallel_reduction": "invariant"}, "data": SEPARATED},
        ["document_placement auto", "context_parallel_reduction invariant"],
        ["--context-parallel-reduction", "--document-placement"],
    ),
}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr("megatron_ring.settings.run_settings.device_type", lambda: "cpu")


@pytest.mark.parametrize(
    ("world_size", "sections", "parts", "flags"), REFUSED.values(), ids=REFUSED
)
def test_an_illegal_combination_is_refused_with_its_rule_and_flags(
    world_size, sections, parts, flags
):
    [problem] = problems(tiny.config(**sections), world_size)
    assert problem.startswith(parts[0])
    assert all(part in problem for part in parts)
    assert all(flag in problem for flag in flags)


def test_every_rule_is_covered_by_an_illegal_combination():
    broken = set()
    for world_size, sections, *_ in REFUSED.values():
        config = tiny.config(**sections)
        grid = Grid.of(config.parallel, world_size)
        broken |= {rule for rule in rules.RULES if rule(config, grid)}
    assert broken == set(rules.RULES)


def test_all_broken_rules_are_reported_together():
    config = tiny.config(
        parallel=tensor(
            4, ulysses_degree=2, pipeline_model_parallel_size=2, context_parallel="ring"
        ),
        model={"num_layers": 1, "ffn_hidden_size": 99},
        data={"seq_length": 47},
        training={"zero_stage": 3, "dtype": "fp16", "global_batch_size": 0},
        memory={"offload_param": "cpu", "mlp_chunks": 64},
    )
    values = [
        "seq_length 47",
        "num_attention_heads 4",
        "num_query_groups 2",
        "ffn_hidden_size 99",
        "num_layers 1",
        "mlp_chunks 64",
        "zero_stage 3",
        "offload_param cpu",
        "dtype fp16",
    ]
    for problem, value in zip(problems(config, 16), values, strict=True):
        assert problem.startswith(value)


def test_too_many_chunks_are_reported_with_a_length_of_fewer_tokens_than_processes():
    config = tiny.config(
        parallel={"context_parallel": "ring"},
        data={"seq_length": 3},
        memory={"mlp_chunks": 2},
    )
    seq_length, mlp_chunks = problems(config, 4)
    assert seq_length.startswith("seq_length 3 ")
    assert mlp_chunks.startswith("mlp_chunks 2 is more than the 1 ")
    assert "--mlp-chunks to at most 1." in mlp_chunks


@pytest.mark.parametrize("heads", [2**31 - 2, 10**40])
def test_problems_of_very_many_heads_are_found_quickly(heads):
    config = tiny.config(
        model={"num_attention_heads": heads, "num_query_groups": 3, "kv_channels": 8},
        parallel=tensor(4),
    )
    messages = limited(lambda: problems(config, 4))
    assert messages[0].startswith("num_attention_heads ")
    assert "--num-attention-heads" in messages[0]


def test_on_cuda_activations_can_be_offloaded(monkeypatch):
    monkeypatch.setattr("megatron_ring.settings.run_settings.device_type", lambda: "cuda")
    assert (
        RunSettings.resolve(tiny.config(memory={"offload_activations": True}), 1).device == "cuda"
    )


LEGAL = {
    "half precision over pipeline x tensor ranks without ZeRO": (
        4,
        {"parallel": tensor(2) | pipe(2), "training": {"zero_stage": 0, "dtype": "bf16"}},
    ),
    "pure Ulysses": (4, {"parallel": {"ulysses_degree": 4, "context_parallel": "ring"}}),
    "fewer key-value heads than Ulysses ranks": (
        4,
        {"parallel": {"ulysses_degree": 4}, "model": {"num_query_groups": 1}},
    ),
    "a padded sample": (
        8,
        {
            "parallel": tensor(2, sequence_parallel=True, ulysses_degree=2),
            "data": {"seq_length": 41},
        },
    ),
    "fewer micro-batches than stages": (2, {"parallel": pipe(2)}),
    "optimizer offload in a pipeline": (
        2,
        {"parallel": pipe(2), "memory": {"offload_optimizer": "cpu"}},
    ),
    "invariant blocks on eight ranks": (
        8,
        {"parallel": {"context_parallel_reduction": "invariant"}},
    ),
    "invariant blocks on one rank": (
        1,
        {"parallel": {"context_parallel_reduction": "invariant"}},
    ),
    "as many chunks as tokens": (4, {"memory": {"mlp_chunks": 12}}),
}


@pytest.mark.parametrize(("world_size", "sections"), LEGAL.values(), ids=LEGAL)
def test_a_legal_combination_close_to_an_illegal_one_is_accepted(world_size, sections):
    assert RunSettings.resolve(tiny.config(**sections), world_size).grid.world_size == world_size


def test_a_sample_is_padded_to_equal_parts():
    setup = RunSettings.resolve(tiny.config(**LEGAL["a padded sample"][1]), 8)
    assert (setup.layout.seq_length, setup.layout.shard_length, setup.tokens_per_rank) == (
        48,
        24,
        12,
    )


def mostly(usual, *others) -> st.SearchStrategy:
    """Draw the usual, legal value most of the time, so that legal configs are found too."""
    return st.sampled_from([usual] * 9 * len(others) + list(others))


@st.composite
def requests(draw) -> tuple[dict, int]:
    """Draw the sections of a config, and a number of processes that mostly suits its degrees."""
    degrees = st.sampled_from([1, 1, 2, 3])
    tensor, pipe, ulysses = draw(degrees), draw(degrees), draw(degrees)
    context = ulysses * draw(st.integers(1, 3))
    layouts = ["ring", "striped", "zigzag"] if context > 1 else ["none", "striped"]
    parallel = {
        "context_parallel": draw(st.sampled_from(layouts)),
        "context_parallel_size": draw(mostly(context, 0, 5)),
        "stripe_size": draw(mostly("auto", 1, 3)),
        "ulysses_degree": draw(mostly(ulysses, 3)),
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipe,
        "sequence_parallel": draw(mostly(tensor > 1, tensor == 1)),
    }
    fields = {
        "model": {
            "num_layers": draw(mostly(3, 1)),
            "num_query_groups": draw(mostly(0, 1, 2)),
            "num_attention_heads": draw(mostly(12, 4)),
            "hidden_size": 48,
            "ffn_hidden_size": draw(mostly(96, 97)),
        },
        "parallel": parallel,
        "data": {"seq_length": draw(st.sampled_from([1, 47, 48, 72, 96]))},
        "training": {
            "zero_stage": draw(st.integers(0, 3 if pipe == 1 else 2)),
            "global_batch_size": draw(mostly(0, 4, 24)),
        },
        "memory": {
            "mlp_chunks": draw(mostly(1, 20)),
            "offload_optimizer": draw(mostly("none", "cpu")),
            "offload_param": draw(mostly("none", "cpu")),
        },
    }
    return fields, pipe * tensor * context * draw(st.integers(1, 2)) + draw(mostly(0, 0, 0, 1))


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(requests())
def test_any_config_is_refused_with_a_flag_or_divided_evenly(request_and_world_size):
    sections, world_size = request_and_world_size
    messages = problems(tiny.config(**sections), world_size)
    assert all("--" in message and message.endswith(".") for message in messages)
    if not messages:
        assert_divided_evenly(RunSettings.resolve(tiny.config(**sections), world_size))
    if len(messages) == 1 and messages[0].startswith("seq_length"):
        nearest = re.search(r"Nearest: ([\d, ]+)\.", messages[0])[1]
        for length in nearest.split(", "):
            legal = sections | {"data": {"seq_length": int(length)}}
            assert problems(tiny.config(**legal), world_size) == []


def assert_divided_evenly(setup: RunSettings) -> None:
    """Assert that all processes have equal shares of everything, and together the whole."""
    config = setup.config
    grid = setup.grid
    layout = setup.layout
    assert config.model.num_attention_heads % (grid.tensor * grid.ulysses) == 0
    assert config.model.key_value_heads % grid.tensor == 0
    assert config.model.feed_forward_size % grid.tensor == 0
    assert config.model.num_layers >= grid.pipe
    parts = [
        layout.positions(r, u, grid.ulysses) for r in range(grid.ring) for u in range(grid.ulysses)
    ]
    assert {len(part) for part in parts} == {setup.tokens_per_rank}
    assert sorted(torch.cat(parts).tolist()) == list(range(layout.seq_length))
    assert 0 <= layout.seq_length - config.data.seq_length < grid.context * grid.tensor
    assert setup.tokens_per_rank % (grid.tensor if config.parallel.sequence_parallel else 1) == 0
    assert (
        setup.micro_batches * config.training.micro_batch_size * grid.data
        == setup.global_batch_size
    )
    assert setup.deepspeed["train_batch_size"] == setup.global_batch_size * grid.context


@pytest.mark.parametrize(
    ("flags", "message", "parts"),
    [
        (
            "--tensor-model-parallel-size 3",
            "tensor_model_parallel_size 3 ",
            ["8 processes", "Legal: 1, 2, 4, 8."],
        ),
        (
            "--pipeline-model-parallel-size 8",
            "num_layers 4 ",
            ["pipeline_model_parallel_size 8"],
        ),
        (
            "--tensor-model-parallel-size 8",
            "num_attention_heads 4 must be a multiple of 8",
            ["tensor_model_parallel_size 8"],
        ),
        (
            "--ulysses-degree 2",
            "ulysses_degree 2 ",
            ["context_parallel none"],
        ),
        (
            "--pipeline-model-parallel-size 2 --zero-stage 3",
            "zero_stage 3 splits gradients",
            ["pipeline_model_parallel_size 2"],
        ),
        (
            "--offload-param cpu",
            "offload_param cpu ",
            ["ZeRO 3", "zero_stage is 1."],
        ),
    ],
)
def test_a_dry_run_of_an_illegal_config_exits_before_it_starts_anything(
    flags, message, parts, monkeypatch, capsys
):
    monkeypatch.setattr(
        sys, "argv", ["pretrain_gpt.py", "--dry-run", "--world-size", "8", *flags.split()]
    )
    environment = Environment.read()
    with pytest.raises(SystemExit) as raised, report_once(environment):
        pretrain_gpt.main(parse_arguments(environment), environment, Stopping(True))
    assert raised.value.code == ConfigError.exit_code
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"\nConfigError on rank 0: {message}")
    assert all(part in stderr for part in parts)
    assert not dist.is_initialized()


def test_the_program_prints_all_problems_and_exits_with_their_code():
    command = (
        "pretrain_gpt.py --dry-run --world-size 4 "
        "--tensor-model-parallel-size 4 --num-query-groups 2 --mlp-chunks 2000"
    )
    process = Forked(command.split(), ROOT, os.environ, subprocess.PIPE)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == ConfigError.exit_code
    assert "num_query_groups 2 must be a multiple of tensor_model_parallel_size 4" in stderr
    assert "mlp_chunks 2000 is more than the 1024 tokens" in stderr
    assert "Traceback" not in stderr
