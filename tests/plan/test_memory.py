"""Planned bytes are those measured: of a layer, of a step's peak and of DeepSpeed's states."""

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
    ring_attention_paper_bytes,
)
from megatron_ring.plan.memory import (
    ERROR,
    Workload,
    ZeroSettings,
    bubble,
    micro_batches_in_flight,
    model_states,
    stage_memory,
)

VOCABULARY, LENGTH = 128, 768
LLAMA = ModelConfig(num_layers=3, hidden_size=64, num_attention_heads=4)
MODELS = {
    "llama": LLAMA,
    "grouped": replace(LLAMA, num_query_groups=1),
    "sinks": replace(LLAMA, softmax_type="learnable"),
    "wide heads": replace(LLAMA, kv_channels=48, num_query_groups=2, add_qkv_bias=True),
    "normalized heads": replace(LLAMA, num_query_groups=2, qk_layernorm=True),
    "heads normalized as in gpt2": replace(LLAMA, normalization="LayerNorm", qk_layernorm=True),
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
    "chunks": MemoryConfig(mlp_chunks=4),
    "full in chunks": MemoryConfig(recompute="full", mlp_chunks=4),
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
    zero = ZeroSettings(stage=0, reduce_bucket_size=0)
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
    """Counted once per storage, without parameters, and without cos and sin, which are shared."""
    built = gpt(config(model), dtype)
    rotation = built.rotation(torch.arange(LENGTH))
    block = next(iter(built.blocks.values()))
    shared = [*block.parameters(), *(vars(rotation).values() if rotation else ())]
    shared_storages = {x.untyped_storage().data_ptr() for x in shared}
    saved = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in shared_storages:
            # The tensor is held, so that no other one gets its address.
            saved[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    x_BlE = torch.randn(1, LENGTH, model.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        block(x_BlE, rotation, None)
    norms = 2 + model.qk_layernorm * (model.num_attention_heads + model.key_value_heads)
    # LayerNorm keeps two numbers per token, planned in float32; on a CPU they are bfloat16.
    in_bfloat16 = model.normalization == "LayerNorm" and dtype != torch.float32
    statistics = 2 * 2 * norms if in_bfloat16 else 0
    measured = sum(nbytes for nbytes, _ in saved.values()) / LENGTH + statistics
    assert layer_bytes(config(model), Grid(), dtype, "cpu").kept == measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["llama", "gpt2", "normalized heads", "wide heads"])
@pytest.mark.parametrize("mode", MODES)
def test_the_planned_peak_of_a_step_is_near_the_measured_one(mode, model, dtype):
    """Forward and backward of one process; parameters exist before, gradients are allocated."""
    run_config = config(MODELS[model], MODES[mode])
    built = gpt(run_config, dtype)
    tokens = torch.randint(VOCABULARY, (1, LENGTH + 1))
    with LiveBytes() as live:
        loss = built(tokens[:, :-1].clone(), torch.arange(LENGTH), None, tokens[:, 1:].clone())
        loss.backward()
    planned = stage_memory(workload(run_config, dtype=dtype), 0)
    assert planned.activations + planned.working == pytest.approx(live.peak, rel=ERROR)


def kept(config: Config, grid: Grid, dtype: torch.dtype = torch.bfloat16, device="cuda") -> float:
    return layer_bytes(config, grid, dtype, device).kept


def test_tensor_ranks_split_everything_except_the_stream_and_the_norms():
    whole = kept(config(), Grid(tensor=1), torch.float32, "cpu")
    half = kept(config(), Grid(tensor=2), torch.float32, "cpu")
    replicated = 2 * (8 * 64 + 4) + 2 * 4 * 64  # what norms keep, and their outputs
    assert half - replicated == (whole - replicated) / 2


def test_sequence_parallel_splits_the_input_and_what_norms_keep():
    memory = MODES["attention too"]
    grid = Grid(tensor=4)
    whole = layer_bytes(config(memory=memory), grid, torch.bfloat16, "cuda")
    split_config = config(memory=memory, sequence_parallel=True)
    split = layer_bytes(split_config, grid, torch.bfloat16, "cuda")
    assert (whole.kept, split.kept) == (2 * 64, 2 * 64 / 4)
    assert split.working < whole.working


@pytest.mark.parametrize(
    ("mode", "split_bytes", "gathers"),
    [
        # For each of two norms what it keeps, 2 x 64 + 8, and the layers' input, 2 x 64.
        ("none", 2 * (136 + 128), 2),
        # Those of attention, and the MLP's input before its norm.
        ("chunks", 136 + 128 + 128, 1),
        # The block's input: everything else is recomputed, with its gathered inputs.
        ("attention too", 128, 0),
    ],
)
def test_sequence_parallel_keeps_a_shard_of_inputs_unless_they_are_recomputed(
    mode, split_bytes, gathers
):
    without = config(memory=MODES[mode], sequence_parallel=False)
    with_shards = config(memory=MODES[mode], sequence_parallel=True)
    grid = Grid(tensor=4)
    assert kept(without, grid) - kept(with_shards, grid) == split_bytes * 3 / 4
    assert inputs_gathered_again(with_shards) == gathers
    assert inputs_gathered_again(without) == 0


def test_ulysses_keeps_the_output_twice_and_repeated_keys():
    grouped = config(MODELS["grouped"])
    without = kept(grouped, Grid(ulysses=1), torch.float32, "cpu")
    with_ulysses = kept(grouped, Grid(ulysses=4), torch.float32, "cpu")
    assert with_ulysses - without == 4 * 64 + 2 * 3 * 4 * 16


def test_the_paper_counts_six_bytes_per_hidden_unit():
    assert ring_attention_paper_bytes(4096) == 6 * 4096


def test_a_stage_keeps_the_activations_of_micro_batches_in_flight():
    assert [micro_batches_in_flight(4, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [micro_batches_in_flight(4, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    load = workload(config(), Grid(pipe=3), 8)
    first, middle, last = (stage_memory(load, stage) for stage in range(3))
    assert first.activations > middle.activations > last.activations
    assert first.parameters == last.parameters - 4 * LLAMA.hidden_size  # the final norm
    assert middle.parameters == first.parameters - 4 * VOCABULARY * LLAMA.hidden_size


def test_the_bubble_is_the_fraction_of_a_step_in_which_a_stage_is_idle():
    assert bubble(4, 9) == 3 / 12
    assert bubble(1, 5) == 0


def test_gradients_coincide_with_activations_from_the_second_micro_batch_on():
    one, two = (stage_memory(workload(config(), micro_batches=n), 0) for n in (1, 2))
    assert two.peak - one.peak == one.gradients


def test_offloaded_activations_leave_two_layers_on_the_device():
    deep = replace(LLAMA, num_layers=10)

    def planned(offload: bool):
        memory = MemoryConfig(offload_activations=offload)
        return stage_memory(workload(config(deep, memory), device="cuda"), 0)

    resident, offloaded = planned(False), planned(True)
    assert resident.host == 0
    assert offloaded.host == resident.activations - offloaded.activations
    assert resident.peak - offloaded.peak == offloaded.host


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
def test_the_documented_table_has_the_counted_bytes(flags, memory):
    model = ModelConfig(
        num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008
    )
    per_token = kept(config(model, memory), Grid(ring=8))
    documented = Path(__file__).parents[2] / "docs" / "benchmarks" / "memory.md"
    assert f"| `{flags}` | {per_token:,.0f} | {per_token / 4096:.1f} |\n" in documented.read_text()


# ---- parameters, gradients and optimizer state, against DeepSpeed 0.19.8 on two processes ----

COUNT = 1000
LEAN = ZeroSettings(ranks=2, reduce_bucket_size=0, max_live_parameters=0)


def bytes_between_steps(dtype: torch.dtype, zero: ZeroSettings) -> float:
    """Return bytes per parameter on the device between steps, when only ZeRO 3 has gradients."""
    states = model_states(COUNT, dtype, zero)
    gradients = states.gradients if zero.stage == 3 else 0
    return (states.parameters + states.optimizer + gradients) / COUNT


@pytest.mark.parametrize(
    ("dtype", "stage", "measured"),
    [
        (torch.float32, 0, 12),
        (torch.float32, 1, 10),
        (torch.float32, 2, 10),
        (torch.float32, 3, 10),
        (torch.bfloat16, 0, 14),
        (torch.bfloat16, 1, 8),
        (torch.bfloat16, 2, 8),
        (torch.bfloat16, 3, 8),
    ],
)
def test_states_between_steps_are_those_measured_with_deepspeed(dtype, stage, measured):
    assert bytes_between_steps(dtype, replace(LEAN, stage=stage)) == measured


def test_zero_shards_the_optimizer_then_gradients_then_parameters():
    stages = [
        model_states(COUNT, torch.bfloat16, replace(LEAN, stage=stage, ranks=10))
        for stage in range(4)
    ]
    assert [states.optimizer for states in stages] == [12_000, 1200, 1200, 1200]
    assert [states.gradients for states in stages] == [2000, 2000, 200, 200]
    assert [states.parameters for states in stages] == [2000, 2000, 2000, 200]


def test_a_bucket_and_gathered_parameters_are_counted_with_deepspeeds_sizes():
    zero = ZeroSettings(stage=3, ranks=2, reduce_bucket_size=70, max_live_parameters=300)
    states = model_states(COUNT, torch.bfloat16, zero)
    assert states.bucket == 70 * 4
    assert states.parameters == 2 * (500 + 300)
    assert model_states(COUNT, torch.bfloat16, replace(zero, stage=2)).bucket == 70 * 2
    all_live = model_states(COUNT, torch.bfloat16, replace(zero, max_live_parameters=10**9))
    assert all_live.parameters == 2 * (500 + 1000)


def test_offloaded_states_are_counted_on_the_host():
    zero = replace(LEAN, stage=3, offload_optimizer=True, offload_param=True)
    states = model_states(COUNT, torch.bfloat16, zero)
    assert (states.parameters, states.gradients, states.optimizer, states.update) == (0, 0, 0, 0)
    assert states.host == 500 * (12 + 2 + 4) + 500 * 2
