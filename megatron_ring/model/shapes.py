"""Names and shapes of a GPT's parameters, read from its modules and stated nowhere else.

A model of one layer is constructed on the meta device, which allocates nothing; all layers have the
same parameters. The planner, the FLOP count and the checkpoint code therefore follow whatever a
model option adds.
"""

import functools
import math
from dataclasses import replace

import torch

from megatron_ring.config import ModelConfig
from megatron_ring.model.gpt import GPT
from megatron_ring.parallel.grid import layers_of_stage
from megatron_ring.parallel.tensor_exchange import TensorParallel

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(
    model: ModelConfig, vocab_size: int, seq_length: int, tensor_ranks: int = 1
) -> Shapes:
    """Return the shape of every parameter by name, in the order of a forward pass.

    With more than one of ``tensor_ranks``, shapes are those of the first rank's parts, which are
    the largest.
    """
    one_layer = _shapes_of_one_layer(model, vocab_size, seq_length, tensor_ranks)
    before, layer, after = {}, {}, {}
    for name, shape in one_layer.items():
        if name.startswith("blocks.0."):
            layer[name.removeprefix("blocks.0.")] = shape
        elif name.startswith(("embedding.", "position_embedding.")):
            before[name] = shape
        else:
            after[name] = shape
    blocks = {
        f"blocks.{number}.{name}": shape
        for number in range(model.num_layers)
        for name, shape in layer.items()
    }
    return before | blocks | after


def layer_shapes(model: ModelConfig, tensor_ranks: int = 1) -> Shapes:
    """Return the shapes of one layer's parameters by their names in the layer."""
    shapes = _shapes_of_one_layer(model, 1, 1, tensor_ranks)
    return {
        name.removeprefix("blocks.0."): shape
        for name, shape in shapes.items()
        if name.startswith("blocks.0.")
    }


def stage_shapes(
    model: ModelConfig,
    vocab_size: int,
    seq_length: int,
    tensor_ranks: int = 1,
    stages: int = 1,
    stage: int = 0,
) -> Shapes:
    """Return the shapes of the parameters that pipeline stage ``stage`` holds, by name.

    The last stage has the output matrix, or its own copy of a tied embedding.
    """
    first = stage == 0
    last = stage == stages - 1
    layers = layers_of_stage(model.num_layers, stages, stage)
    tied = not model.untie_embeddings_and_output_weights
    held = {
        "embedding": first or (last and tied),
        "position_embedding": first,
        "final_norm": last,
        "output": last,
    }

    def is_held(name: str) -> bool:
        module, rest = name.split(".", 1)
        return int(rest.split(".")[0]) in layers if module == "blocks" else held[module]

    shapes = parameter_shapes(model, vocab_size, seq_length, tensor_ranks)
    return {name: shape for name, shape in shapes.items() if is_held(name)}


def element_count(shapes: Shapes) -> int:
    """Return the number of elements of all parameters in ``shapes``."""
    return sum(math.prod(shape) for shape in shapes.values())


@functools.lru_cache(maxsize=64)
def _shapes_of_one_layer(
    model: ModelConfig, vocab_size: int, seq_length: int, tensor_ranks: int
) -> Shapes:
    """Return the shapes of a model of one layer, in an order that callers must not change."""
    tensor = TensorParallel(rank=0, size=tensor_ranks)
    with torch.device("meta"):
        gpt = GPT(replace(model, num_layers=1), vocab_size, seq_length, None, tensor)
    shapes = {name: tuple(parameter.shape) for name, parameter in gpt.named_parameters()}
    # The embedding is registered after the layers, but comes first in a forward pass.
    return {"embedding.weight": shapes.pop("embedding.weight"), **shapes}
