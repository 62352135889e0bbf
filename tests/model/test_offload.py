"""Activations are copied out once, in order, and come back unchanged; the device is the CPU."""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.live_memory import LiveMemory, storage_of
from megatron_ring.config import MemoryConfig, ModelConfig
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.model import offload
from megatron_ring.model.gpt import Layers
from megatron_ring.model.initialization import build
from megatron_ring.model.offload import Offload
from megatron_ring.model.recompute import run_block
from megatron_ring.parallel.collectives import ProcessGroups

LENGTH, CPU = 16, torch.device("cpu")
MODES = {
    "none": MemoryConfig(),
    "selective": MemoryConfig(recompute="selective"),
    "full": MemoryConfig(recompute="full"),
    "attention too": MemoryConfig(recompute="full", recompute_attention=True),
}
each_mode = pytest.mark.parametrize("memory", MODES.values(), ids=MODES)


@pytest.fixture
def events(monkeypatch) -> list[tuple]:
    """Record ("copy", bytes) of each copy as it begins; tests add events of their own."""
    events, copy = [], offload._copy

    def recorded(to: torch.Tensor, of: torch.Tensor, device: torch.device) -> None:
        events.append(("copy", to.numel()))
        copy(to, of, device)

    monkeypatch.setattr(offload, "_copy", recorded)
    return events


def forward(layers: Layers, x_BSE: torch.Tensor, layer: Callable) -> torch.Tensor:
    """Run the layers, each in the context that ``layer()`` returns."""
    rotation = layers.rotation(torch.arange(x_BSE.shape[1]))
    for block in layers.blocks.values():
        with layer():
            x_BSE = run_block(block, layers.memory, x_BSE, rotation, None)
    return x_BSE


def gradients(config: ModelConfig, memory: MemoryConfig, layer: Callable) -> list[torch.Tensor]:
    attention = ContextParallelAttention(Layout("none", LENGTH, 1), "reference", ProcessGroups())
    blocks = build(Layers, config, LENGTH, attention, seed=1, memory=memory)
    x_BSE = torch.randn(
        2, LENGTH, config.hidden_size, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    forward(blocks, x_BSE, layer).sin().sum().backward()
    return [x_BSE.grad, *(parameter.grad for parameter in blocks.blocks.parameters())]


@pytest.mark.parametrize("chunks", [1, 3])
@each_mode
def test_offloading_changes_no_number(memory, chunks, config, events):
    memory = replace(memory, mlp_chunks=chunks)
    expected = gradients(config, memory, contextlib.nullcontext)
    assert events == []
    assert all(
        map(torch.equal, gradients(config, memory, Offload(CPU, smallest=0).layer), expected)
    )
    assert events != []


def test_a_recomputed_layer_copies_its_input_and_attention_out_and_back_once(llama, events):
    gradients(llama, MODES["full"], Offload(CPU, smallest=0).layer)
    tokens = 2 * LENGTH
    x = out = tokens * llama.hidden_size * 4
    lse = tokens * llama.num_attention_heads * 4
    assert sorted(events) == sorted(
        [("copy", size) for size in (x, out, lse)] * llama.num_layers * 2
    )


@each_mode
def test_device_memory_is_free_between_a_layers_forward_and_its_backward(memory, llama):
    """Alive in the end are the input, the output, what all layers share, and the copies."""
    kept = Offload(CPU, smallest=0)
    attention = ContextParallelAttention(Layout("none", LENGTH, 1), "reference", ProcessGroups())
    layers = build(Layers, llama, LENGTH, attention, seed=1, memory=memory)
    with LiveMemory() as live:
        x_BSE = torch.randn(2, LENGTH, llama.hidden_size).requires_grad_()
        y_BSE = forward(layers, x_BSE, kept.layer)
        copies = sum(
            copy.numel() for layer in (kept.last, kept.last.previous) for copy in layer.copies
        )
        assert copies > 0
        assert (
            live.alive() - copies
            <= x_BSE.nbytes + y_BSE.nbytes + 2 * LENGTH * llama.head_dim // 2 * 4
        )


class Saving(torch.autograd.Function):
    """x + 1, which saves ``tensors`` and calls ``on_backward`` with them in its backward."""

    @staticmethod
    def forward(ctx, x, on_backward, *tensors):
        ctx.on_backward = on_backward
        ctx.save_for_backward(*tensors)
        return x + 1

    @staticmethod
    def backward(ctx, dx):
        ctx.on_backward(*ctx.saved_tensors)
        return dx, None, *(None for _ in ctx.saved_tensors)


def test_a_layer_is_fetched_before_backward_reaches_it(events):
    kept, y = Offload(CPU, smallest=0), torch.zeros(1, requires_grad=True)
    for number in range(4):
        with kept.layer():
            # The n-th layer saves n + 1 bytes.
            saved = torch.zeros(number + 1, dtype=torch.uint8)
            y = Saving.apply(
                y, lambda _, number=number: events.append(("backward", number + 1)), saved
            )
    assert events == [("copy", 1), ("copy", 2), ("copy", 3), ("copy", 4)]
    events.clear()
    y.backward()
    assert events == [
        ("copy", 4), ("copy", 3), ("backward", 4),
        ("copy", 2), ("backward", 3),
        ("copy", 1), ("backward", 2),
        ("backward", 1),
    ]  # fmt: skip


def test_no_more_than_two_layers_are_fetched_at_a_time():
    kept, y, size = Offload(CPU, smallest=0), torch.zeros(1, requires_grad=True), 1000
    with LiveMemory(lambda x: x.numel() == size) as live:
        for _ in range(6):
            with kept.layer():
                y = Saving.apply(y, lambda *_: None, torch.zeros(size, dtype=torch.uint8))
        in_cpu_memory = live.alive()
        y.backward()
    assert in_cpu_memory == 6 * size
    assert live.peak == in_cpu_memory + 2 * size


def saved_and_restored(kept: Offload, *tensors: torch.Tensor) -> list[torch.Tensor]:
    restored = []
    with kept.layer():
        y = Saving.apply(
            torch.zeros(1, requires_grad=True), lambda *saved: restored.extend(saved), *tensors
        )
    y.backward()
    return restored


def test_views_of_a_storage_share_one_copy_and_are_views_again(events):
    whole = torch.randn(4, 6)
    views = [
        whole,
        whole.t(),
        whole[1:3, ::2],
        whole.chunk(2)[1],
        whole.flatten(),
        whole.view(torch.int32),
    ]
    restored = saved_and_restored(Offload(CPU, smallest=0), *views)
    assert all(map(torch.equal, restored, views))
    assert [x.stride() for x in restored] == [x.stride() for x in views]
    assert {storage_of(x) for x in restored} != {storage_of(whole)}
    assert events == [("copy", whole.nbytes)] * 2


def test_small_storages_stay_on_the_device(events):
    small, large = torch.randn(3), torch.randn(4)
    restored = saved_and_restored(Offload(CPU, smallest=16), small, large)
    assert events == [("copy", 16)] * 2
    assert [storage_of(x) == storage_of(y) for x, y in zip(restored, (small, large))] == [
        True,
        False,
    ]


def test_parameters_stay_and_may_have_other_memory_in_backward(events):
    """ZeRO 3 frees a parameter after forward and gathers it in other memory for backward."""
    weight = nn.Parameter(torch.zeros(8, 8))
    restored = []
    with Offload(CPU, smallest=0).layer():
        y = Saving.apply(
            torch.zeros(1, requires_grad=True), lambda *saved: restored.extend(saved), weight
        )
    weight.data = torch.ones(8, 8)
    y.backward()
    assert storage_of(restored[0]) == storage_of(weight)
    assert events == []


def test_the_weight_of_a_linear_layer_is_not_copied(events):
    weight, x = nn.Parameter(torch.randn(8, 8)), torch.randn(2, 8, requires_grad=True)
    with Offload(CPU, smallest=0).layer():
        y = functional.linear(x, weight)
    y.sum().backward()
    assert events == [("copy", x.nbytes)] * 2


@pytest.mark.parametrize("smallest", [0, 1 << 20])
def test_a_saved_result_is_freed_without_the_garbage_collector(smallest):
    """By reference counts: a result that held itself would not be."""
    with Offload(CPU, smallest).layer():
        y = torch.zeros(8, requires_grad=True).exp()  # exp saves its result
    storage = storage_of(y)
    del y
    assert storage.expired()


def test_a_retained_graph_returns_its_gradients_again(events):
    kept, x = Offload(CPU, smallest=0), torch.randn(8, requires_grad=True)
    y = x
    for _ in range(3):
        with kept.layer():
            y = y.sin()
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True) for _ in range(2))
    assert torch.equal(*first, *second)
    assert len(events) == 3 + 2 * 3
