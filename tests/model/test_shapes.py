"""Shapes read from one layer are those of the whole model, its tensor ranks and its stages."""

from dataclasses import replace

import pytest

from megatron_ring.model.gpt import GPT, Layers
from megatron_ring.model.shapes import layer_shapes, parameter_shapes, stage_shapes
from megatron_ring.parallel.grid import layers_of_stage
from megatron_ring.parallel.tensor_exchange import TensorParallel
from tests.model.conftest import CONFIGS, LENGTH, plain_attention

VOCABULARY = 50
MODELS = {
    **CONFIGS,
    "five layers": replace(CONFIGS["qwen"], num_layers=5),
    "untied": replace(CONFIGS["llama"], untie_embeddings_and_output_weights=True),
}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def shapes_of(module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


@each_model
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shapes_are_those_of_the_built_model_on_the_first_tensor_rank(model, ranks):
    tensor = TensorParallel(rank=0, size=ranks)
    built = GPT(model, VOCABULARY, LENGTH, plain_attention, tensor)
    assert parameter_shapes(model, VOCABULARY, LENGTH, ranks) == shapes_of(built)


@each_model
def test_shapes_begin_with_the_embedding_and_follow_the_forward_pass(model):
    names = list(parameter_shapes(model, VOCABULARY, LENGTH))
    modules = list(dict.fromkeys(name.split(".")[0] for name in names))
    order = ["embedding", "position_embedding", "blocks", "final_norm", "output"]
    assert modules == [module for module in order if module in modules]


@each_model
def test_a_layer_has_the_shapes_of_each_block(model):
    built = GPT(model, VOCABULARY, LENGTH, plain_attention)
    for block in built.blocks.values():
        assert layer_shapes(model) == shapes_of(block)


@pytest.mark.parametrize("model", ["five layers", "untied", "gpt2"])
@pytest.mark.parametrize("stages", [1, 2])
def test_stages_hold_their_layers_and_the_vocabulary_at_both_ends(model, stages):
    config = MODELS[model]
    for stage in range(stages):
        layers = Layers(
            config,
            LENGTH,
            plain_attention,
            layers=layers_of_stage(config.num_layers, stages, stage),
        )
        vocabulary = {"embedding.weight"} if stage == 0 else set()
        if stage == stages - 1:
            untied = config.untie_embeddings_and_output_weights
            vocabulary.add("output.weight" if untied else "embedding.weight")
        expected = shapes_of(layers) | {
            name: (VOCABULARY, config.hidden_size) for name in vocabulary
        }
        assert stage_shapes(config, VOCABULARY, LENGTH, 1, stages, stage) == expected


def test_a_vocabulary_that_does_not_divide_is_counted_on_the_first_rank(llama):
    shapes = parameter_shapes(llama, VOCABULARY, LENGTH, tensor_ranks=4)
    assert shapes["embedding.weight"] == (13, llama.hidden_size)
