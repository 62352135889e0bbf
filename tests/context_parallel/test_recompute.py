"""Recomputing a layer between real ranks does not send the keys around a second time."""

from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch

from megatron_ring.config import MemoryConfig, ModelConfig
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.model.gpt import Layers
from megatron_ring.model.initialization import build
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.grid import Grid
from tests.distributed import run_ranks

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2)
GRIDS = {3: Grid(ring=3), 4: Grid(ring=2, ulysses=2)}  # by world size
LENGTH = 12  # of one process
DOCUMENTS = {"one document": None, "packed": torch.tensor([0, 5, 17])}

RECOMPUTE_MODES = {
    "none": MemoryConfig(),
    "selective": MemoryConfig(recompute="selective"),
    "full": MemoryConfig(recompute="full"),
    "attention too": MemoryConfig(recompute="full", recompute_attention=True),
}
MEMORY = {
    f"{name}, {chunks} chunks": replace(mode, mlp_chunks=chunks)
    for name, mode in RECOMPUTE_MODES.items()
    for chunks in (1, 5)
}


class StepResult(NamedTuple):
    """Numbers of exchanges started in forward and in backward, and all gradients."""

    forward: int
    backward: int
    gradients: list[torch.Tensor]


def on_real_ranks(rank: int, world_size: int) -> dict[tuple[str, str], StepResult]:
    grid = GRIDS[world_size]
    groups = ProcessGroups.build(grid, rank)
    at = grid.coordinates(rank)
    layout = Layout("striped", LENGTH * world_size, grid.ring)
    attention = ContextParallelAttention(layout, "reference", groups)
    positions = layout.positions(at.ring, at.ulysses, grid.ulysses)
    results = {}
    for packing, starts in DOCUMENTS.items():
        for name, memory in MEMORY.items():
            layers = build(
                Layers, MODEL, layout.seq_length, attention, seed=1, memory=memory
            ).double()
            generator = torch.Generator().manual_seed(rank)
            x_BlE = torch.randn(1, LENGTH, MODEL.hidden_size, generator=generator).double()
            results[packing, name] = step(layers, x_BlE, positions, starts)
    return results


def step(layers: Layers, x_BlE: torch.Tensor, *inputs: torch.Tensor | None) -> StepResult:
    x_BlE.requires_grad_()
    with patch.object(
        RingExchange, "start_with", autospec=True, side_effect=RingExchange.start_with
    ) as start:
        y_BlE = layers.run(x_BlE, *inputs)
        forward = start.call_count
        y_BlE.sin().sum().backward()
        gradients = [x_BlE.grad, *(parameter.grad for parameter in layers.parameters())]
        return StepResult(forward, start.call_count - forward, gradients)


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[tuple[str, str], StepResult]]]:
    """The results of every rank, by world size."""
    return {world_size: run_ranks(world_size, on_real_ranks) for world_size in GRIDS}


each_memory = pytest.mark.parametrize("name", MEMORY)
each_world = pytest.mark.parametrize("world_size", GRIDS)
each_packing = pytest.mark.parametrize("packing", DOCUMENTS)


@each_memory
@each_packing
@each_world
def test_keys_travel_once_forward_whatever_is_recomputed(world_size, packing, name, results):
    once = MODEL.num_layers * (GRIDS[world_size].ring - 1)
    of_gradients = 2 * once  # keys, and their gradients after them
    of_recomputation = once if MEMORY[name].recompute_attention else 0
    for of_rank in results[world_size]:
        assert of_rank[packing, name].forward == once
        assert of_rank[packing, name].backward == of_gradients + of_recomputation


@each_memory
@each_packing
@each_world
def test_gradients_equal_those_without_recomputation(world_size, packing, name, results):
    for of_rank in results[world_size]:
        expected = of_rank[packing, "none, 1 chunks"].gradients
        gradients = of_rank[packing, name].gradients
        largest = max(float(gradient.abs().max()) for gradient in expected)
        rounding = 0 if MEMORY[name].mlp_chunks == 1 else 1e-12 * largest
        for gradient, expected_gradient in zip(gradients, expected):
            torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=rounding)
