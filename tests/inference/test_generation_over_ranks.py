"""The same text on any number of ranks, in any batch and in prefill chunks of any size."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ring.inference.generation import generate
from megatron_ring.inference.loading import load
from megatron_ring.inference.model import InferenceModel
from megatron_ring.inference.sampling import Sampler
from tests.distributed import run_ranks
from tests.inference import models
from tests.model.conftest import plain_attention

MODEL = replace(models.LLAMA, window_size=7, window_attn_skip_freq=2)
PROMPTS = [[5], list(range(1, 14)), [9, 3]]
NEW = 20
SAMPLER = Sampler(temperature=1.0, top_k=30, top_p=0.95, seed=2**40 + 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    models.write_checkpoint(folder, models.random_model(MODEL), MODEL)
    return folder


def generated(rank: int, world_size: int, folder: Path, runs: list[tuple]) -> list[list]:
    """Return the tokens by run: tensor ranks, sampler, batch size, chunk size."""
    results = []
    for tensor, sampler, batch_size, chunk_size in runs:
        options = models.options(folder, tensor_model_parallel_size=tensor)
        loaded = load(options, models.environment(rank, world_size))
        core = InferenceModel.of(loaded)
        tokens = []
        for start in range(0, len(PROMPTS), batch_size):
            batch = PROMPTS[start : start + batch_size]
            found = generate(
                core,
                batch,
                NEW,
                sampler,
                numbers=range(start, start + len(batch)),
                prefill_chunk_size=chunk_size,
            )
            tokens += [each.tokens for each in found]
        results.append(tokens)
    return results


@torch.no_grad()
def greedy_by_full_forward(prompt: list[int]) -> list[int]:
    model = models.random_model(MODEL)
    for block in model.blocks.values():
        block.attention.attention = plain_attention
    tokens = list(prompt)
    for _ in range(NEW):
        logits = model(torch.tensor([tokens]), torch.arange(len(tokens)))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_the_same_text_on_any_number_of_ranks(folder):
    greedy = [greedy_by_full_forward(prompt) for prompt in PROMPTS]
    assert len({token for tokens in greedy for token in tokens}) > 5
    (alone,) = run_ranks(
        1, generated, folder, [(1, Sampler(), 1, 0), (1, SAMPLER, 1, 0), (1, SAMPLER, 3, 0)]
    )
    assert alone[0] == greedy
    sampled = alone[1]
    assert alone[2] == sampled
    assert sampled != greedy
    for world_size, tensor in ((2, 1), (2, 2), (3, 1)):
        runs = [(tensor, Sampler(), 3, 5), (tensor, SAMPLER, 2, 0)]
        for of_rank in run_ranks(world_size, generated, folder, runs):
            assert of_rank == [greedy, sampled]
