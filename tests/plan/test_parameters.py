"""Counted parameters are those of built models."""

from dataclasses import replace

import pytest

from megatron_ring.config import ModelConfig
from megatron_ring.model.gpt import GPT, Layers
from megatron_ring.parallel.grid import Grid, layers_of_stage
from megatron_ring.parallel.tensor_exchange import TensorParallel
from megatron_ring.plan.parameters import parameter_count, parameters_of_stage, share

VOCABULARY, LENGTH = 50, 16

LLAMA = ModelConfig(num_layers=5, hidden_size=32, num_attention_heads=4, num_query_groups=2)
MODELS = {
    "llama": LLAMA,
    "untied": replace(LLAMA, untie_embeddings_and_output_weights=True),
    "sinks": replace(LLAMA, softmax_type="learnable"),
    "qwen": replace(LLAMA, kv_channels=12, qk_layernorm=True, add_qkv_bias=True),
    "normalized heads": replace(LLAMA, normalization="LayerNorm", qk_layernorm=True),
    "gpt2": replace(
        LLAMA,
        num_query_groups=0,
        normalization="LayerNorm",
        activation="gelu",
        add_bias_linear=True,
        position_embedding_type="learned_absolute",
    ),
}


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_single_process_holds_the_whole_model(config):
    planned = parameters_of_stage(config, VOCABULARY, LENGTH, Grid(), 0)
    assert planned == parameter_count(config, VOCABULARY, LENGTH)
    assert planned == count(GPT(config, VOCABULARY, LENGTH, lambda *_: None))


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_tensor_rank_holds_its_part_and_the_replicated_parameters(config):
    tensor = TensorParallel(rank=0, size=2)
    model = GPT(config, VOCABULARY, LENGTH, lambda *_: None, tensor)
    assert parameters_of_stage(config, VOCABULARY, LENGTH, Grid(tensor=2), 0) == count(model)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("tensor", [1, 2])
def test_stages_hold_their_layers_and_the_vocabulary_at_both_ends(config, tensor):
    for stage in range(3):
        layers = Layers(
            config,
            LENGTH,
            lambda *_: None,
            TensorParallel(rank=0, size=tensor),
            layers=layers_of_stage(config.num_layers, 3, stage),
        )
        rows = share(VOCABULARY, tensor) if stage != 1 else 0
        planned = parameters_of_stage(
            config, VOCABULARY, LENGTH, Grid(pipe=3, tensor=tensor), stage
        )
        assert planned == count(layers) + rows * config.hidden_size


def test_an_indivisible_vocabulary_is_counted_on_the_first_rank():
    one_less = parameters_of_stage(LLAMA, 50, LENGTH, Grid(tensor=4), 0)
    assert one_less - parameters_of_stage(LLAMA, 48, LENGTH, Grid(tensor=4), 0) == LLAMA.hidden_size
