"""Fused operations of a library give a model torch's numbers, with any recomputation."""

from collections import Counter
from dataclasses import fields, replace
from functools import partial

import pytest
import torch

from megatron_ring.config import MemoryConfig
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.engine.pipeline_engine import StageEmbedding, StageLayers, StageOutput
from megatron_ring.kernels.fused import choose_libraries, liger
from megatron_ring.kernels.fused.choose_libraries import OperationChoice, OperationChoices
from megatron_ring.kernels.fused.libraries import Operation
from megatron_ring.kernels.fused.operations import TORCH, Operations
from megatron_ring.model import gpt
from megatron_ring.model.gpt import GPT
from megatron_ring.model.initialization import build
from megatron_ring.model.offload import Offload
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.settings.run_settings import RunSettings
from megatron_ring.training.assembly import build_model
from tests.kernels.fused.interpreted import interpreted  # noqa: F401
from tests.model.conftest import CONFIGS, LENGTH, VOCABULARY, plain_attention
from tests.tolerances import TOLERANCE, error
from tests.training import tiny

LIGER = Operations(liger.norm, liger.rope, liger.swiglu, liger.cross_entropy)
TRITON = choose_libraries._operations(
    [
        OperationChoice(operation, "triton", "")
        for operation in (Operation.RMS_NORM, Operation.ROPE, Operation.SWIGLU)
    ]
)
TOKENS = 6
MEMORY = {
    "selective": {"recompute": "selective"},
    "selective in chunks": {"recompute": "selective", "mlp_chunks": 2},
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
    """Return the loss sum of a sample, some targets ignored, and the gradients of one layer.

    There are few tokens, because the interpreter takes about a millisecond per token and operation.
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


@pytest.mark.parametrize("memory", [{}, *MEMORY.values()], ids=["all kept", *MEMORY])
@pytest.mark.parametrize("model", ["llama", "qwen"])
def test_a_model_with_our_kernels_has_the_numbers_of_torch(
    model,
    memory,
    interpreted,  # noqa: F811
    monkeypatch,
):
    """The residual stream, packed keys and values, and recomputation of all of it."""
    monkeypatch.setattr(gpt, "Offload", partial(Offload, smallest=1))
    found = results(model, TRITON, **memory)
    expected = results(model, TORCH, torch.float64)
    assert max(map(error, found, expected)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("model", ["qwen", "gpt2"])
def test_a_model_with_liger_operations_has_the_numbers_of_torch(model, interpreted):  # noqa: F811
    """Covers RMSNorm of tokens and heads, RoPE and SwiGLU (qwen), and LayerNorm (gpt2)."""
    found = results(model, LIGER)
    expected = results(model, TORCH, torch.float64)
    assert max(map(error, found, expected)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("memory", MEMORY.values(), ids=MEMORY)
def test_recomputed_results_have_the_same_numbers(memory, interpreted, monkeypatch):  # noqa: F811
    """Triton kernels write unobserved; Liger's RoPE would rotate kept results in place."""
    monkeypatch.setattr(gpt, "Offload", partial(Offload, smallest=1))
    found = results("llama", LIGER, **memory)
    expected = results("llama", LIGER)
    in_chunks = memory.get("mlp_chunks", 1) > 1
    assert max(map(error, found, expected)) <= (TOLERANCE[torch.float32] if in_chunks else 0)


@pytest.fixture
def counted() -> tuple[Operations, Counter]:
    """Return torch's operations and a count of the calls of each."""
    calls = Counter()

    def counting(name, function):
        return lambda *arguments: calls.update([name]) or function(*arguments)

    return Operations(
        **{
            field.name: counting(field.name, function)
            for field in fields(Operations)
            if (function := getattr(TORCH, field.name))
        }
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


def test_build_model_uses_the_operations_of_the_setup(counted):
    setup = replace(
        RunSettings.resolve(tiny.config(), 1), operations=OperationChoices((), counted[0])
    )
    model = build_model(setup, ProcessGroups(), plain_attention, tiny.VOCAB)
    assert model.operations is counted[0]
    assert model.blocks["0"].mlp_norm.function is counted[0].norm
