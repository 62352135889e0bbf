"""Planned bytes against measured ones: what autograd saves of a layer, exactly, and a whole step's peak, nearly."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.live_memory import LiveBytes
from megatron_ring.config import Config, DataConfig, MemoryConfig, ModelConfig, ParallelConfig
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.model.gpt import GPT
from megatron_ring.model.initialization import build
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.grid import Grid
from megatron_ring.plan.activations import (
    inputs_gathered_again,
    layer_bytes,
    papers_bytes_per_token,
)
from megatron_ring.plan.memory import ERROR, Workload, bubble, micro_batches_in_flight, stage_memory
from megatron_ring.plan.zero import Zero

VOCABULARY, LENGTH = 128, 768
LLAMA = ModelConfig(num_layers=3, hidden_size=64, num_attention_heads=4)
MODELS = {
    "llama": LLAMA,
    "grouped": replace(LLAMA, num_query_groups=1),
    "sinks": replace(LLAMA, softmax_type="learnable"),
    "wide heads": replace(LLAMA, kv_channels=48, num_query_groups=2, add_qkv_bias=True),
    "normalised heads": replace(LLAMA, num_query_groups=2, qk_layernorm=True),
    "heads normalised as in gpt2": replace(LLAMA, normalization="LayerNorm", qk_layernorm=True),
    "gpt2": replace(
        LLAMA,
        normalization="LayerNorm",
        activation="gelu",
        add_bias_linear=True,
        position_embedding_type="learned_absolute",
    ),
}
MODES = {
    "none": MemoryConfig(),
    "selective": MemoryConfig(recompute="selective"),
    "full": MemoryConfig(recompute="full"),
    "attention too": MemoryConfig(recompute="full", recompute_attention=True),
    "pieces": MemoryConfig(mlp_chunks=4),
    "full in pieces": MemoryConfig(recompute="full", mlp_chunks=4),
    "whole logits": MemoryConfig(recompute="full", mlp_chunks=4, loss_chunk_size=0),
}


def config(model: ModelConfig = LLAMA, memory: MemoryConfig = MODES["none"], **parallel) -> Config:
    return Config(
        model=model,
        data=DataConfig(seq_length=LENGTH),
        memory=memory,
        parallel=ParallelConfig(**parallel),
    )


ONE = Grid()


def workload(config: Config, grid: Grid = ONE, micro_batches: int = 1, **changes) -> Workload:
    zero = Zero(stage=0, reduce_bucket_size=0)
    load = Workload(config, grid, LENGTH, VOCABULARY, micro_batches, torch.float32, "cpu", zero)
    return replace(load, **changes)


def gpt(config: Config, dtype: torch.dtype) -> GPT:
    attention = ContextParallelAttention(Layout("none", LENGTH, 1), "sdpa", ProcessGroups())
    return build(
        GPT,
        config.model,
        VOCABULARY,
        LENGTH,
        attention,
        seed=0,
        dtype=dtype,
        memory=config.memory,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_layer_keeps_what_autograd_saves(model, dtype):
    """Once for each storage; parameters, and cos and sin, are there for all layers."""
    built = gpt(config(model), dtype)
    rotation, block = built.rotation(torch.arange(LENGTH)), next(iter(built.blocks.values()))
    shared = [*block.parameters(), *(vars(rotation).values() if rotation else ())]
    of_all = {x.untyped_storage().data_ptr() for x in shared}
    saved = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in of_all:
            saved[storage.data_ptr()] = (
                storage.nbytes(),
                x,
            )  # held, so that no other gets its address
        return x

    x_BlE = torch.randn(1, LENGTH, model.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        block(x_BlE, rotation, None)
    norms = 2 + model.qk_layernorm * (model.num_attention_heads + model.key_value_heads)
    # Two numbers of each, which are in bfloat16 on a CPU.
    statistics = (
        2 * 2 * norms if model.normalization == "LayerNorm" and dtype != torch.float32 else 0
    )
    measured = sum(nbytes for nbytes, _ in saved.values()) / LENGTH + statistics
    assert layer_bytes(config(model), Grid(), dtype, "cpu").kept == measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["llama", "gpt2", "normalised heads", "wide heads"])
@pytest.mark.parametrize("mode", MODES)
def test_the_peak_of_a_step_is_what_was_planned(mode, model, dtype):
    """Forward and backward of one process, whose parameters are there already and whose gradients come."""
    asked = config(MODELS[model], MODES[mode])
    built = gpt(asked, dtype)
    tokens, positions = torch.randint(VOCABULARY, (1, LENGTH + 1)), torch.arange(LENGTH)
    with LiveBytes() as live:
        built(tokens[:, :-1].clone(), positions, None, tokens[:, 1:].clone()).backward()
    planned = stage_memory(workload(asked, dtype=dtype), 0)
    assert planned.activations + planned.working == pytest.approx(live.peak, rel=ERROR)


def test_split_over_tensor_ranks_only_the_stream_and_the_norms_are_whole():
    whole, half = (
        layer_bytes(config(), Grid(tensor=ranks), torch.float32, "cpu").kept for ranks in (1, 2)
    )
    replicated = 2 * (8 * 64 + 4) + 2 * 4 * 64  # what norms keep, and their outputs
    assert half - replicated == (whole - replicated) / 2


def test_sequence_parallel_splits_what_norms_keep_and_the_input():
    memory = MODES["attention too"]
    whole = layer_bytes(config(memory=memory), Grid(tensor=4), torch.bfloat16, "cuda")
    split = layer_bytes(
        config(memory=memory, sequence_parallel=True), Grid(tensor=4), torch.bfloat16, "cuda"
    )
    assert (whole.kept, split.kept) == (2 * 64, 2 * 64 / 4)
    assert split.working < whole.working


@pytest.mark.parametrize(
    ("mode", "split_bytes", "gathers"),
    [
        # Of two norms each what it keeps, 2 x 64 + 8, and the layers' input, 2 x 64.
        ("none", 2 * (136 + 128), 2),
        # Attention's alone, and the feed-forward's input before its norm.
        ("pieces", 136 + 128 + 128, 1),
        # The block's input: everything else is computed again, its gathered inputs too.
        ("attention too", 128, 0),
    ],
)
def test_sequence_parallel_keeps_a_shard_of_inputs_unless_they_are_computed_again(
    mode, split_bytes, gathers
):
    without, with_it = (
        config(memory=MODES[mode], sequence_parallel=enabled) for enabled in (False, True)
    )
    whole, shards = (
        layer_bytes(each, Grid(tensor=4), torch.bfloat16, "cuda").kept
        for each in (without, with_it)
    )
    assert whole - shards == split_bytes * 3 / 4
    assert inputs_gathered_again(with_it) == gathers
    assert inputs_gathered_again(without) == 0


def test_ulysses_keeps_the_output_twice_and_repeated_keys():
    grouped = config(MODELS["grouped"])
    alone, members = (
        layer_bytes(grouped, Grid(ulysses=n), torch.float32, "cpu").kept for n in (1, 4)
    )
    assert members - alone == 4 * 64 + 2 * 3 * 4 * 16


def test_the_paper_counts_six_blocks_of_one_byte_pairs():
    assert papers_bytes_per_token(4096) == 6 * 4096


def test_a_stage_keeps_the_micro_batches_that_are_in_flight():
    assert [micro_batches_in_flight(4, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [micro_batches_in_flight(4, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    first, middle, last = (
        stage_memory(workload(config(), Grid(pipe=3), 8), stage) for stage in range(3)
    )
    assert first.activations > middle.activations > last.activations
    assert first.parameters == last.parameters - 4 * LLAMA.hidden_size  # the final norm
    assert middle.parameters == first.parameters - 4 * VOCABULARY * LLAMA.hidden_size


def test_stages_wait_for_a_share_of_the_step():
    assert bubble(4, 9) == 3 / 12
    assert bubble(1, 5) == 0


def test_gradients_meet_the_activations_from_the_second_micro_batch_on():
    one, two = (stage_memory(workload(config(), micro_batches=n), 0) for n in (1, 2))
    assert two.peak - one.peak == one.gradients


def test_offloaded_activations_leave_two_layers_on_the_device():
    deep = replace(LLAMA, num_layers=10)
    here, away = (
        stage_memory(
            workload(config(deep, MemoryConfig(offload_activations=away)), device="cuda"), 0
        )
        for away in (False, True)
    )
    assert (here.host, away.host) == (0, here.activations - away.activations)
    assert here.peak - away.peak == away.host


@pytest.mark.parametrize(
    ("flags", "memory"),
    [
        ("--recompute none", MemoryConfig()),
        ("--recompute none --mlp-chunks 8", MemoryConfig(mlp_chunks=8)),
        ("--recompute selective", MemoryConfig(recompute="selective")),
        ("--recompute full", MemoryConfig(recompute="full")),
        (
            "--recompute full --recompute-attention",
            MemoryConfig(recompute="full", recompute_attention=True),
        ),
    ],
)
def test_the_table_of_the_documentation(flags, memory):
    model = ModelConfig(
        num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008
    )
    kept = layer_bytes(config(model, memory), Grid(ring=8), torch.bfloat16, "cuda").kept
    documented = Path(__file__).parents[2] / "docs" / "benchmarks" / "memory.md"
    assert f"| `{flags}` | {kept:,.0f} | {kept / 4096:.1f} |\n" in documented.read_text()
