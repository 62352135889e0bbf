"""What inference sends: bytes of a decoded token and of a chunk, and memory over a long generation.

Ranks are real; the bytes are counted where this process posts them.
"""

import functools
from typing import NamedTuple

import pytest
import torch.distributed as dist

from megatron_ring.inference import cache as cache_module
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.grid import Grid
from tests.distributed import run_ranks
from tests.inference.core_models import MODELS, inference_model, prompt

RANKS = 2
LAYERS = 2
SAMPLES = 3
FLOAT32 = 4
PROMPT = 40
CHUNK = 8
GENERATED = 50


class Traffic(NamedTuple):
    """What one rank sends, and what it allocates.

    Attributes:
        merged: bytes of each message of one decoded token of every sample.
        of_whole_prompt: bytes of each ring message when the prompt is prefilled at once.
        of_chunks: the same for every chunk.
        cache_bytes: allocated for the windowed model's cache after each generated token.
        held: the most entries that its windowed layers hold after any token.
    """

    merged: list[int]
    of_whole_prompt: list[int]
    of_chunks: list[list[int]]
    cache_bytes: list[int]
    held: int


def on_real_ranks(rank: int, world_size: int) -> Traffic:
    groups = ProcessGroups.build(Grid(ring=world_size), rank)
    reduced, sent = [], []
    all_reduce, start = dist.all_reduce, RingExchange.start

    def counting_all_reduce(tensor, *args, **kwargs):
        reduced.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    def counting_start(exchange, tensor, *args):
        sent.append(tensor.nbytes)
        return start(exchange, tensor, *args)

    def taken(counted: list[int]) -> list[int]:
        values = counted[:]
        counted.clear()
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting_all_reduce)
        patch.setattr(RingExchange, "start", counting_start)
        patch.setattr(cache_module, "_FREE_ENTRIES", 2)
        llama = inference_model("llama", groups)

        cache = llama.new_cache(SAMPLES, [8] * SAMPLES)
        llama.prefill([[1, 2, 3]] * SAMPLES, cache)
        taken(reduced)
        taken(sent)
        llama.decode([4] * SAMPLES, cache)
        assert not reduced
        of_token = taken(sent)

        llama.prefill([prompt(0, PROMPT)], llama.new_cache(1, [PROMPT]))
        of_whole_prompt = taken(sent)
        of_chunks = []
        cache = llama.new_cache(1, [PROMPT])
        llama.prefill(
            [prompt(0, PROMPT)], cache, CHUNK, lambda done, total: of_chunks.append(taken(sent))
        )

        windowed = inference_model("yarn", groups)
        cache = windowed.new_cache(1, [PROMPT + GENERATED])
        windowed.prefill([prompt(0, PROMPT)], cache)
        cache_bytes = []
        held = 0
        for token in prompt(1, GENERATED):
            windowed.decode([token], cache)
            cache_bytes.append(cache.nbytes)
            held = max(held, *(kv.entries for kvs in cache.layers.values() for kv in kvs))
    return Traffic(of_token, of_whole_prompt, of_chunks, cache_bytes, held)


@functools.cache
def traffic() -> list[Traffic]:
    return run_ranks(RANKS, on_real_ranks)


@pytest.fixture(params=range(RANKS))
def of_rank(request) -> Traffic:
    return traffic()[request.param]


def test_a_token_is_merged_by_one_exchange_a_layer_of_head_dim_plus_two(of_rank):
    config = MODELS["llama"]
    heads = config.num_attention_heads
    expected = SAMPLES * heads * (config.head_dim + 2) * FLOAT32
    assert of_rank.merged == [expected] * LAYERS


def test_a_prompt_prefilled_at_once_sends_the_keys_as_in_training(of_rank):
    config = MODELS["llama"]
    keys = 2 * (PROMPT // RANKS) * config.key_value_heads * config.head_dim * FLOAT32
    assert of_rank.of_whole_prompt == [keys] * LAYERS * (RANKS - 1)


def test_no_chunk_sends_more_than_its_queries_and_their_results(of_rank):
    config = MODELS["llama"]
    rows = CHUNK // RANKS * config.num_attention_heads
    queries = rows * config.head_dim * FLOAT32
    results = rows * (config.head_dim + 1) * FLOAT32
    key = 2 * config.key_value_heads * config.head_dim * FLOAT32
    assert len(of_rank.of_chunks) == PROMPT // CHUNK
    for number, sent in enumerate(of_rank.of_chunks, start=1):
        keys = number * CHUNK // RANKS * key
        lighter = [keys] if keys <= queries + results else [queries, results]
        assert sorted(sent) == sorted(lighter * LAYERS * (RANKS - 1))
    # The last chunks would send the whole cache otherwise.
    assert sum(of_rank.of_chunks[-1]) < PROMPT // RANKS * key * LAYERS


def test_the_memory_of_windowed_layers_is_bounded_over_a_long_generation(of_rank):
    config = MODELS["yarn"]
    entries = -(-config.window_size // RANKS) + 2
    of_entry = 2 * config.key_value_heads * config.head_dim * FLOAT32
    assert set(of_rank.cache_bytes) == {LAYERS * entries * of_entry}
    assert of_rank.held <= entries
