"""A model by another library's operations: torch's numbers, whatever is computed again, on every stage."""

from collections import Counter
from dataclasses import fields, replace
from functools import partial

import pytest
import torch

from megatron_ring.config import MemoryConfig
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.engine.pipeline_engine import StageEmbedding, StageLayers, StageOutput
from megatron_ring.kernels.fused import liger
from megatron_ring.kernels.fused.choice import Choice
from megatron_ring.kernels.fused.operations import TORCH, Operations
from megatron_ring.model import gpt
from megatron_ring.model.gpt import GPT
from megatron_ring.model.initialization import build
from megatron_ring.model.offload import Offload
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.settings.setup import Setup
from megatron_ring.training.assembly import build_model
from tests.kernels.fused.interpreted import interpreted  # noqa: F401
from tests.model.conftest import CONFIGS, LENGTH, VOCABULARY, plain_attention
from tests.tolerances import TOLERANCE, error
from tests.training import tiny

LIGER = Operations(liger.norm, liger.rope, liger.swiglu, liger.cross_entropy)
TOKENS = 6
AGAIN = {
    "selective": {"recompute": "selective"},
    "selective in pieces": {"recompute": "selective", "mlp_chunks": 2},
    "full": {"recompute": "full"},
    "attention too": {"recompute": "full", "recompute_attention": True},
    "offloaded": {"offload_activations": True},
    "selective offloaded": {"recompute": "selective", "offload_activations": True},
}


def results(
    name: str,
    operations: Operations,
    dtype: torch.dtype = torch.float32,
    **memory: object,
) -> list[torch.Tensor]:
    """The loss sum of a sample, with targets that do not count, and the parameters' gradients; one layer, few tokens.

    Few, because the interpreter takes a millisecond or so for every token of every operation.
    """
    ring_of_one = ContextParallelAttention(Layout("none", TOKENS, 1), "reference", ProcessGroups())
    model = build(
        GPT,
        replace(CONFIGS[name], num_layers=1),
        VOCABULARY,
        TOKENS,
        ring_of_one,
        seed=1,
        operations=operations,
        memory=MemoryConfig(loss_chunk_size=4, **memory),
    ).to(dtype)
    tokens = torch.randint(VOCABULARY, (1, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    targets = torch.where(torch.arange(TOKENS) % 4 == 3, -100, tokens[:, 1:])
    loss = model(tokens[:, :-1], torch.arange(TOKENS), None, targets)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("model", ["qwen", "gpt2"])
def test_a_model_by_liger_has_the_numbers_of_one_by_torch(model, interpreted):  # noqa: F811
    """RMSNorm of tokens and of heads, RoPE and SwiGLU in the one, LayerNorm in the other."""
    found = results(model, LIGER)
    expected = results(model, TORCH, torch.float64)
    assert max(map(error, found, expected)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("memory", AGAIN.values(), ids=AGAIN)
def test_what_is_kept_or_computed_again_is_what_it_was(memory, interpreted, monkeypatch):  # noqa: F811
    """Triton's kernels write unseen by what keeps results; Liger's RoPE would turn what was kept."""
    monkeypatch.setattr(gpt, "Offload", partial(Offload, smallest=1))
    found = results("llama", LIGER, **memory)
    expected = results("llama", LIGER)
    in_chunks = memory.get("mlp_chunks", 1) > 1
    assert max(map(error, found, expected)) <= (TOLERANCE[torch.float32] if in_chunks else 0)


@pytest.fixture
def counted() -> tuple[Operations, Counter]:
    """torch's operations and how often each was called."""
    calls = Counter()

    def counting(name, function):
        return lambda *arguments: calls.update([name]) or function(*arguments)

    return Operations(
        *(counting(field.name, getattr(TORCH, field.name)) for field in fields(Operations))
    ), calls


def test_operations_reach_every_stage_of_a_pipeline(counted, llama, tokens_BS, positions_S):
    operations, calls = counted
    shared = {"seed": 1, "operations": operations}
    embedding = build(StageEmbedding, llama, VOCABULARY, prefix="embedding", **shared)
    stages = [
        build(StageLayers, llama, LENGTH, plain_attention, layers=range(n, n + 1), **shared)
        for n in range(2)
    ]
    output = build(StageOutput, llama, VOCABULARY, prefix="output", **shared)
    tensors = embedding((tokens_BS, tokens_BS, positions_S))
    for stage in stages:
        tensors = stage(tensors)
    output(tensors)
    assert calls == {"norm": 5, "rope": 2, "swiglu": 2, "cross_entropy": 1}


def test_a_run_builds_its_model_with_what_was_settled(counted):
    setup = replace(Setup.of(tiny.config(), 1), operations=Choice((), counted[0]))
    model = build_model(setup, ProcessGroups(), plain_attention, tiny.VOCAB)
    assert model.operations is counted[0]
    assert model.blocks["0"].mlp_norm.function is counted[0].norm
