"""Every illegal combination is refused by its rule before anything starts; what is not refused makes a whole setup."""

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
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.grid import Grid
from megatron_ring.settings import rules
from megatron_ring.settings.setup import Setup
from megatron_ring.training.entry import arguments, report_once
from megatron_ring.training.stopping import Stopping
from tests.forked import Forked
from tests.training import tiny

ROOT = Path(__file__).parents[2]


def problems(config: Config, world_size: int) -> list[str]:
    try:
        assert Setup.of(config, world_size).grid.world_size == world_size
    except ConfigError as refused:
        return refused.problems
    return []


def tensor(size: int, **more) -> dict:
    return {"tensor_model_parallel_size": size, **more}


def pipe(size: int) -> dict:
    return {"pipeline_model_parallel_size": size}


# Processes, what is asked of the tiny run (4 heads on 2 groups, hidden 32, 2 layers, 48 tokens), and what is said.
REFUSED = {
    "heads over tensor ranks": (
        6,
        {"parallel": tensor(3), "model": {"num_query_groups": 0, "ffn_hidden_size": 96}},
        "num_attention_heads 4 must be a multiple of 3 (tensor_model_parallel_size 3 x ulysses_degree 1): heads are "
        "split over tensor ranks, then traded among Ulysses ranks. Nearest: 3, 6; with 4 heads the product may be "
        "1, 2, 4. Set --num-attention-heads, --tensor-model-parallel-size or --ulysses-degree.",
    ),
    "heads over tensor and Ulysses ranks": (
        16,
        {"parallel": tensor(2, ulysses_degree=4)},
        "num_attention_heads 4 must be a multiple of 8 (tensor_model_parallel_size 2 x ulysses_degree 4): heads are "
        "split over tensor ranks, then traded among Ulysses ranks. Nearest: 8; with 4 heads the product may be "
        "1, 2, 4. Set --num-attention-heads, --tensor-model-parallel-size or --ulysses-degree.",
    ),
    "key-value heads over tensor ranks": (
        4,
        {"parallel": tensor(4)},
        "num_query_groups 2 must be a multiple of tensor_model_parallel_size 4: key-value heads are split over tensor "
        "ranks, not repeated there. Set --tensor-model-parallel-size (legal: 1, 2), or --num-query-groups (legal: 4).",
    ),
    "feed-forward over tensor ranks": (
        2,
        {"parallel": tensor(2), "model": {"ffn_hidden_size": 99}},
        "ffn_hidden_size 99 must be a multiple of tensor_model_parallel_size 2, whose ranks split it. Nearest: 98, "
        "100. Set --ffn-hidden-size or --tensor-model-parallel-size.",
    ),
    "blocks that no rank has": (
        4,
        {
            "parallel": {
                "context_parallel_reduction": "invariant",
                "context_parallel": "zigzag",
                "stripe_size": 1,
            }
        },
        "context_parallel_reduction invariant adds up over 8 blocks of a sample, each whole on a rank, but "
        "context_parallel is zigzag with stripe_size 1 on 4 ring ranks. Legal: striped with 1 on 1, 2, 4, 8 ring "
        "ranks. Set --context-parallel striped with --stripe-size 1, --context-parallel-size, or "
        "--context-parallel-reduction arrival.",
    ),
    "blocks of other lengths": (
        4,
        {
            "parallel": {"context_parallel_reduction": "invariant", "stripe_size": 1},
            "data": {"seq_length": 44},
        },
        "seq_length 44 does not divide into the 8 blocks of context_parallel_reduction invariant. Nearest: 40, 48. "
        "Set --seq-length, or --context-parallel-reduction arrival.",
    ),
    "nothing to share tokens with": (
        2,
        {"parallel": {"sequence_parallel": True}},
        "sequence_parallel has no effect while tensor_model_parallel_size is 1. "
        "Set --tensor-model-parallel-size, or leave --sequence-parallel out.",
    ),
    "more stages than layers": (
        4,
        {"parallel": pipe(4)},
        "num_layers 2 leaves stages of pipeline_model_parallel_size 4 without a layer. "
        "Set --num-layers to at least 4, or --pipeline-model-parallel-size to at most 2.",
    ),
    "a batch that data ranks cannot share": (
        4,
        {
            "parallel": {"context_parallel": "none"},
            "training": {"global_batch_size": 6, "micro_batch_size": 1},
        },
        "global_batch_size 6 must be a positive multiple of 4 (micro_batch_size 1 x 4 data ranks). Nearest: 4, 8. "
        "Set --global-batch-size.",
    ),
    "chunks of less than a token": (
        4,
        {"parallel": tensor(2, sequence_parallel=True), "memory": {"mlp_chunks": 13}},
        "mlp_chunks 13 is more than the 12 tokens that a process has of a sequence. Set --mlp-chunks to at most 12.",
    ),
    "ZeRO 2 in a pipeline": (
        2,
        {"parallel": pipe(2), "training": {"zero_stage": 2}},
        "zero_stage 2 splits gradients, but stages of pipeline_model_parallel_size 2 keep theirs whole until the last "
        "micro-batch. Legal: 0, 1. Set --zero-stage 1, or --pipeline-model-parallel-size 1.",
    ),
    "an optimizer that ZeRO does not keep": (
        2,
        {"training": {"zero_stage": 0}, "memory": {"offload_optimizer": "cpu"}},
        "offload_optimizer cpu moves what ZeRO keeps of the optimizer, and with zero_stage 0 that is nothing. "
        "Legal: 1, 2, 3. Set --zero-stage 1, or --offload-optimizer none.",
    ),
    "parameters that ZeRO does not keep": (
        2,
        {"training": {"zero_stage": 2}, "memory": {"offload_param": "cpu"}},
        "offload_param cpu moves parameters that ZeRO 3 has split, and zero_stage is 2. "
        "Legal: 3. Set --zero-stage 3, or --offload-param none.",
    ),
    "parameters of a pipeline": (
        2,
        {"parallel": pipe(2), "memory": {"offload_param": "cpu"}},
        "offload_param cpu needs zero_stage 3, which no pipeline takes. "
        "Set --offload-param none, or --pipeline-model-parallel-size 1 with --zero-stage 3.",
    ),
    "half precision over tensor ranks without ZeRO": (
        2,
        {"parallel": tensor(2), "training": {"zero_stage": 0, "dtype": "bf16"}},
        "zero_stage 0 in bf16 would count the gradient's norm wrongly (DeepSpeed's optimizer for it does) where 2 "
        "processes share a model: 2 tensor x 1 pipeline ranks. Set --zero-stage 1, or --dtype fp32.",
    ),
    "a way back to no checkpoint": (
        1,
        {"guards": {"on_bad_step": "roll-back"}},
        "on_bad_step roll-back needs checkpoints to go back to, and save_interval is 0, with save empty. "
        "Set --save and --save-interval, or --on-bad-step skip.",
    ),
    "fp16 on a CPU": (
        1,
        {"training": {"dtype": "fp16"}},
        "dtype fp16 is emulated on a CPU, hundreds of times slower. Set --dtype auto, fp32 or bf16.",
    ),
    "activations moved to where they are": (
        1,
        {"memory": {"offload_activations": True}},
        "offload_activations has no effect on this device, a CPU: activations lie in its memory already. "
        "Leave --offload-activations out.",
    ),
    "a shard that Ulysses ranks cannot share": (
        4,
        {"parallel": {"context_parallel": "ring", "ulysses_degree": 2}, "data": {"seq_length": 46}},
        "seq_length 46 cannot be laid out ring on 2 ring ranks of 2 Ulysses ranks: it must be a multiple of 4 (ring "
        "size, and ring size x Ulysses degree). Nearest: 44, 48. Set --seq-length.",
    ),
    "tokens that tensor ranks cannot share": (
        8,
        {
            "parallel": tensor(
                2, sequence_parallel=True, context_parallel="zigzag", ulysses_degree=2
            ),
            "data": {"seq_length": 44},
        },
        "seq_length 44 cannot be cut into 8 equal parts (2 ring x 2 Ulysses x 2 tensor ranks, by sequence_parallel) "
        "and laid out zigzag: it must be a multiple of 8. Nearest: 40, 48. Set --seq-length, use --context-parallel "
        "striped with --stripe-size 1, which takes any length, or leave --sequence-parallel out.",
    ),
}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr("megatron_ring.settings.setup.device_type", lambda: "cpu")


@pytest.mark.parametrize(("world_size", "sections", "message"), REFUSED.values(), ids=REFUSED)
def test_an_illegal_combination_is_refused_with_its_rule_and_its_remedy(
    world_size, sections, message
):
    assert problems(tiny.config(**sections), world_size) == [message]


def test_every_rule_is_broken_by_an_input_above():
    broken = set()
    for world_size, sections, _ in REFUSED.values():
        config = tiny.config(**sections)
        grid = Grid.of(config.parallel, world_size)
        broken |= {rule for rule in rules.RULES if rule(config, grid)}
    assert broken == set(rules.RULES)


def test_rules_broken_together_are_said_together():
    config = tiny.config(
        parallel=tensor(
            4, ulysses_degree=2, pipeline_model_parallel_size=2, context_parallel="ring"
        ),
        model={"num_layers": 1, "ffn_hidden_size": 99},
        data={"seq_length": 47},
        training={"zero_stage": 3, "dtype": "fp16", "global_batch_size": 0},
        memory={"offload_param": "cpu", "mlp_chunks": 64},
    )
    found = problems(config, 16)
    asked = [
        "seq_length 47",
        "num_attention_heads 4",
        "num_query_groups 2",
        "ffn_hidden_size 99",
        "num_layers 1",
    ]
    asked += ["mlp_chunks 64", "zero_stage 3", "offload_param cpu", "dtype fp16"]
    assert [problem.startswith(name) for problem, name in zip(found, asked, strict=True)] == [
        True
    ] * len(asked)


def test_a_device_that_activations_can_be_moved_from(monkeypatch):
    monkeypatch.setattr("megatron_ring.settings.setup.device_type", lambda: "cuda")
    assert Setup.of(tiny.config(memory={"offload_activations": True}), 1).device == "cuda"


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
    "a filled shard": (
        8,
        {
            "parallel": tensor(2, sequence_parallel=True, ulysses_degree=2),
            "data": {"seq_length": 41},
        },
    ),
    "fewer micro-batches than stages": (2, {"parallel": pipe(2)}),
    "an optimizer moved out of a pipeline": (
        2,
        {"parallel": pipe(2), "memory": {"offload_optimizer": "cpu"}},
    ),
    "blocks of the sample on eight ranks": (
        8,
        {"parallel": {"context_parallel_reduction": "invariant"}},
    ),
    "blocks of the sample on one rank": (
        1,
        {"parallel": {"context_parallel_reduction": "invariant"}},
    ),
    "as many chunks as tokens": (4, {"memory": {"mlp_chunks": 12}}),
}


@pytest.mark.parametrize(("world_size", "sections"), LEGAL.values(), ids=LEGAL)
def test_a_legal_combination_near_an_illegal_one(world_size, sections):
    assert Setup.of(tiny.config(**sections), world_size).grid.world_size == world_size


def test_a_ragged_sample_is_filled_up_to_equal_parts():
    setup = Setup.of(tiny.config(**LEGAL["a filled shard"][1]), 8)
    assert (setup.layout.seq_length, setup.layout.shard_length, setup.resident_length) == (
        48,
        24,
        12,
    )


def mostly(usual, *others) -> st.SearchStrategy:
    """What is usually legal, so that hypothesis finds its way past all the rules too."""
    return st.sampled_from([usual] * 9 * len(others) + list(others))


@st.composite
def requests(draw) -> tuple[dict, int]:
    """Fields of a config, section by section, and a number of processes that mostly suits its degrees."""
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
def test_whatever_is_asked_for_is_refused_with_a_flag_or_comes_out_even(request_and_world_size):
    sections, world_size = request_and_world_size
    found = problems(tiny.config(**sections), world_size)
    assert all("--" in problem and problem.endswith(".") for problem in found)
    if not found:
        assert_even(Setup.of(tiny.config(**sections), world_size))
    if len(found) == 1 and found[0].startswith("seq_length"):
        nearest = re.search(r"Nearest: ([\d, ]+)\.", found[0])[1]
        assert not any(
            problems(tiny.config(**sections | {"data": {"seq_length": int(length)}}), world_size)
            for length in nearest.split(", ")
        )


def assert_even(setup: Setup) -> None:
    """Every process has as much of everything as every other, and together they have it all."""
    config, grid, layout = setup.config, setup.grid, setup.layout
    assert config.model.num_attention_heads % (grid.tensor * grid.ulysses) == 0
    assert (
        config.model.key_value_heads % grid.tensor
        == config.model.feed_forward_size % grid.tensor
        == 0
    )
    assert config.model.num_layers >= grid.pipe
    runs = [
        layout.positions(r, u, grid.ulysses) for r in range(grid.ring) for u in range(grid.ulysses)
    ]
    assert {len(run) for run in runs} == {setup.resident_length}
    assert sorted(torch.cat(runs).tolist()) == list(range(layout.seq_length))
    assert 0 <= layout.seq_length - config.data.seq_length < grid.context * grid.tensor
    assert setup.resident_length % (grid.tensor if config.parallel.sequence_parallel else 1) == 0
    assert (
        setup.micro_batches * config.training.micro_batch_size * grid.data
        == setup.global_batch_size
    )
    assert setup.deepspeed["train_batch_size"] == setup.global_batch_size * grid.context


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--tensor-model-parallel-size 3",
            "tensor_model_parallel_size 3 does not divide the 8 processes that run.",
        ),
        (
            "--pipeline-model-parallel-size 8",
            "num_layers 4 leaves stages of pipeline_model_parallel_size 8",
        ),
        ("--tensor-model-parallel-size 8", "num_attention_heads 4 must be a multiple of 8"),
        (
            "--ulysses-degree 2",
            "ulysses_degree 2 splits sequences, but context_parallel none keeps them whole.",
        ),
        ("--pipeline-model-parallel-size 2 --zero-stage 3", "zero_stage 3 splits gradients"),
        (
            "--offload-param cpu",
            "offload_param cpu moves parameters that ZeRO 3 has split, and zero_stage is 1.",
        ),
    ],
)
def test_a_dry_run_of_what_cannot_work_says_so_and_starts_nothing(
    flags, message, monkeypatch, capsys
):
    monkeypatch.setattr(
        sys, "argv", ["pretrain_gpt.py", "--dry-run", "--world-size", "8", *flags.split()]
    )
    environment = Environment.read()
    with pytest.raises(SystemExit) as left, report_once(environment):
        pretrain_gpt.main(arguments(environment), environment, Stopping(speaks=True))
    assert left.value.code == ConfigError.exit_code
    assert capsys.readouterr().err.startswith(f"\nConfigError on rank 0: {message}")
    assert not dist.is_initialized()


def test_the_program_leaves_with_all_that_is_wrong_and_its_exit_code():
    command = (
        "pretrain_gpt.py --dry-run --world-size 4 "
        "--tensor-model-parallel-size 4 --num-query-groups 2 --mlp-chunks 2000"
    )
    process = Forked(command.split(), ROOT, os.environ, subprocess.PIPE)
    _, said = process.communicate(timeout=60)
    assert process.returncode == ConfigError.exit_code
    assert "num_query_groups 2 must be a multiple of tensor_model_parallel_size 4" in said
    assert "mlp_chunks 2000 is more than the 1024 tokens" in said
    assert "Traceback" not in said
