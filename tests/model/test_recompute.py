"""Recomputation changes no number, runs the ring once, and keeps exactly the documented bytes."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.live_memory import LiveMemory, storage_of
from megatron_ring.config import MemoryConfig, ModelConfig
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.model.attention import AttentionFunction
from megatron_ring.model.gpt import Layers
from megatron_ring.model.initialization import build
from megatron_ring.model.recompute import in_chunks, run_block
from megatron_ring.parallel.collectives import ProcessGroups
from tests.model.conftest import plain_attention

LENGTH = 16
RECOMPUTED = {
    "selective": MemoryConfig(recompute="selective"),
    "full": MemoryConfig(recompute="full"),
    "attention too": MemoryConfig(recompute="full", recompute_attention=True),
}
MODES = {"none": MemoryConfig(), **RECOMPUTED}

each_mode = pytest.mark.parametrize("memory", MODES.values(), ids=MODES)
each_recomputed = pytest.mark.parametrize("memory", RECOMPUTED.values(), ids=RECOMPUTED)


def ring_of_one(length: int = LENGTH, kernel: str = "reference") -> AttentionFunction:
    return ContextParallelAttention(Layout("none", length, 1), kernel, ProcessGroups())


ATTENTION = {"the ring": ring_of_one(), "a plain function": plain_attention}


def run(
    layers: Layers, dtype: torch.dtype, length: int = LENGTH
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an input of two samples and the output of the layers."""
    generator = torch.Generator().manual_seed(0)
    x_BSE = torch.randn(
        2, length, layers.blocks["0"].mlp_norm.weight.numel(), generator=generator
    ).to(dtype)
    starts = torch.tensor([0, 5, length, length + 3])
    return x_BSE.requires_grad_(), layers.run(x_BSE, torch.arange(length), starts)


def results(
    config: ModelConfig, attention: AttentionFunction, memory: MemoryConfig
) -> list[torch.Tensor]:
    """Return output, gradient of the input and gradients of the parameters, in float64."""
    layers = build(Layers, config, LENGTH, attention, seed=1, memory=memory).double()
    x_BSE, y_BSE = run(layers, torch.float64)
    y_BSE.sin().sum().backward()
    return [y_BSE.detach(), x_BSE.grad, *(parameter.grad for parameter in layers.parameters())]


@pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION)
@each_recomputed
def test_recomputation_changes_no_number(memory, attention, config):
    expected = results(config, attention, MODES["none"])
    assert all(map(torch.equal, results(config, attention, memory), expected))


@pytest.mark.parametrize("chunks", [2, 3, 16, 100], ids="{} chunks".format)
@pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION)
@each_mode
def test_chunks_change_sums_by_rounding_only(memory, attention, chunks, config):
    expected = results(config, attention, MODES["none"])
    found = results(config, attention, replace(memory, mlp_chunks=chunks))
    largest = max(float(x.abs().max()) for x in expected)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12 * largest)


class Calls(TorchDispatchMode):
    """Count the calls of every operator."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count[operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))

    @property
    def matmuls(self) -> int:
        return sum(self.count[name] for name in ("mm", "addmm", "bmm"))


def calls(config: ModelConfig, attention: AttentionFunction, memory: MemoryConfig) -> Calls:
    with Calls() as counted:
        results(config, attention, memory)
    return counted


@pytest.mark.parametrize(
    ("mode", "runs"), [("none", 1), ("selective", 1), ("full", 1), ("attention too", 2)]
)
@pytest.mark.parametrize("chunks", [1, 4])
def test_the_ring_runs_once_a_layer_unless_attention_is_recomputed(mode, runs, chunks, config):
    counted = calls(config, ring_of_one(), replace(MODES[mode], mlp_chunks=chunks))
    assert counted.count["ring_attention"] == runs * config.num_layers
    assert counted.count["ring_attention_backward"] == config.num_layers


@pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION)
def test_selective_recomputes_activations_and_no_matmul(attention, config):
    plain, selective, full = (
        calls(config, attention, MODES[mode]) for mode in ("none", "selective", "full")
    )
    assert plain.matmuls == selective.matmuls < full.matmuls
    for activation in ("silu", "gelu"):
        assert 2 * plain.count[activation] == selective.count[activation] == full.count[activation]


def test_evaluation_keeps_and_recomputes_nothing(config):
    for memory in RECOMPUTED.values():
        layers = build(
            Layers, config, LENGTH, plain_attention, seed=1, memory=replace(memory, mlp_chunks=4)
        )
        with torch.no_grad(), LiveMemory() as live:
            x_BSE, y_BSE = run(layers, torch.float32)
        assert not y_BSE.requires_grad
        assert live.alive() == x_BSE.nbytes + y_BSE.nbytes


class BiasAddedInPlace(torch.autograd.Function):
    """DeepSpeed's linear layer under ZeRO 3: it modifies the product before it returns it."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        y = x.matmul(weight.t())
        y += bias
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy.matmul(weight), dy.flatten(0, 1).t() @ x.flatten(0, 1), dy.sum((0, 1))


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = BiasAddedInPlace.apply(x, self.up.weight, self.up.bias).sin()
        return BiasAddedInPlace.apply(inner, self.down.weight, self.down.bias).sin()


def test_a_matmul_that_is_modified_in_place_is_recomputed():
    block, x = TwoLayers(), torch.randn(2, 5, 8)
    nn.init.ones_(block.up.bias)
    gradients = [
        torch.autograd.grad(run_block(block, memory, x).sum(), list(block.parameters()))
        for memory in (MODES["none"], MODES["selective"])
    ]
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("chunks", [1, 3])
@each_recomputed
def test_a_retained_graph_returns_its_gradients_again(memory, chunks, llama):
    layers = build(
        Layers, llama, LENGTH, ring_of_one(), seed=1, memory=replace(memory, mlp_chunks=chunks)
    ).double()
    with LiveMemory() as live:
        x_BSE, y_BSE = run(layers, torch.float64)
        before = live.alive()
        gradients = [
            torch.autograd.grad(y_BSE.sin().sum(), x_BSE, retain_graph=True)[0] for _ in range(2)
        ]
        assert live.alive() == before + 2 * x_BSE.nbytes
    assert torch.equal(*gradients)


# ---- chunks ----


@pytest.mark.parametrize(
    ("tokens", "chunks", "lengths"),
    [(16, 1, [16]), (16, 4, [4, 4, 4, 4]), (16, 3, [6, 6, 4]), (9, 4, [3, 3, 3]), (2, 4, [1, 1])],
)
def test_chunks_are_equal_except_a_shorter_last_one(tokens, chunks, lengths):
    run_lengths = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        run_lengths.append(x.shape[1])
        return x.exp()

    x = torch.randn(2, tokens, 3, requires_grad=True)
    y = in_chunks(layer, x, chunks)
    assert run_lengths == lengths
    assert torch.equal(y, x.exp())
    y.sum().backward()
    # In backward, the chunks run again in reverse order, on every rank.
    assert run_lengths == lengths + (lengths[::-1] if chunks > 1 else [])


@each_mode
def test_the_gradient_of_a_parameter_is_delivered_once(memory, llama):
    """ZeRO reduces a gradient when it is delivered, so chunks must not deliver parts of it."""
    layers = build(
        Layers, llama, LENGTH, ring_of_one(), seed=1, memory=replace(memory, mlp_chunks=4)
    )
    delivered = Counter()
    for name, parameter in layers.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: delivered.update([name]))
    run(layers, torch.float32)[1].sum().backward()
    assert delivered == {name: 1 for name, _ in layers.named_parameters()}


# ---- memory ----

WIDE = ModelConfig(
    num_layers=3, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=192
)
E, F, H, KV, BF16, FP32 = 64, 192, 4, 32, 2, 4
TOKENS = 48  # of each of the two samples

# Bytes per token in a layer: the block's input, then the ring's output and log-sum-exp, then
# matmuls.
INPUT, RING = BF16 * E, BF16 * E + FP32 * H
ATTENTION_MATMULS = BF16 * (E + 2 * KV + E)
MLP_MATMULS = BF16 * (2 * F + E)
KEPT = {
    "selective": INPUT + RING + ATTENTION_MATMULS + MLP_MATMULS,
    "full": INPUT + RING,
    "attention too": INPUT,
}


def alive_after_forward(layers: int, memory: MemoryConfig) -> int:
    config = replace(WIDE, num_layers=layers)
    ring = ring_of_one(TOKENS, "sdpa")
    model = build(Layers, config, TOKENS, ring, seed=1, dtype=torch.bfloat16, memory=memory)
    with LiveMemory() as live:
        step = run(model, torch.bfloat16, TOKENS)
        alive = live.alive()
        del step
    return alive


def bytes_per_token_and_layer(memory: MemoryConfig) -> float:
    return (alive_after_forward(3, memory) - alive_after_forward(2, memory)) / (2 * TOKENS)


@pytest.mark.parametrize("mode", KEPT)
def test_a_layer_keeps_the_documented_bytes_in_bf16(mode):
    assert bytes_per_token_and_layer(MODES[mode]) == KEPT[mode]


def test_without_recomputation_a_layer_keeps_much_more():
    assert bytes_per_token_and_layer(MODES["none"]) > 2 * KEPT["selective"]


def test_chunks_keep_no_matmul():
    memory = replace(MODES["selective"], mlp_chunks=4)
    assert bytes_per_token_and_layer(memory) == KEPT["selective"] - MLP_MATMULS
    memory = replace(MODES["full"], mlp_chunks=4)
    assert bytes_per_token_and_layer(memory) == KEPT["full"]


def peak_of_inner_activations(memory: MemoryConfig) -> tuple[int, int]:
    """Return the peak bytes of activations of width F, in forward and over the step."""
    ring = ring_of_one(TOKENS, "sdpa")
    model = build(Layers, WIDE, TOKENS, ring, seed=1, dtype=torch.bfloat16, memory=memory)
    with LiveMemory(lambda x: x.shape[-1:] == (F,) and x.shape != (E, F)) as live:
        _, y_BSE = run(model, torch.bfloat16, TOKENS)
        forward = live.peak
        y_BSE.sum().backward()
    return forward, live.peak


@each_mode
def test_only_one_chunk_at_a_time_has_inner_activations(memory):
    # One of three blocks at a time; backward recomputes it before it differentiates it.
    forward, step = peak_of_inner_activations(MODES["full"])
    assert forward >= BF16 * F * 2 * TOKENS * 2
    chunked_forward, chunked_step = peak_of_inner_activations(replace(memory, mlp_chunks=4))
    assert chunked_forward <= forward / 4
    assert chunked_step == step / 4


@pytest.mark.parametrize("chunks", [1, 4])
@each_recomputed
def test_backward_frees_all_that_recomputation_kept(memory, chunks):
    """After a step as much is alive as without recomputation, although the graph is still alive."""
    left = {}
    for name, each in {
        "plain": MODES["none"],
        "recomputed": replace(memory, mlp_chunks=chunks),
    }.items():
        model = build(Layers, WIDE, TOKENS, ring_of_one(TOKENS), seed=1, memory=each)
        with LiveMemory() as live:
            step = run(model, torch.float32, TOKENS)
            step[1].sum().backward()
            left[name] = live.alive()
    assert left["recomputed"] == left["plain"]


@each_recomputed
def test_a_dropped_graph_is_freed_without_the_garbage_collector(memory, llama):
    """By reference counts: a block that held itself would not be."""
    layers = build(
        Layers, llama, LENGTH, ring_of_one(), seed=1, memory=replace(memory, mlp_chunks=3)
    )
    with LiveMemory() as live:
        y_BSE = run(layers, torch.float32)[1]
        storage = storage_of(y_BSE)
        del y_BSE
        assert storage.expired()
        assert live.alive() == 0
