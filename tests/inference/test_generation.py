"""The loop of generation, with a stand-in for the model."""

from collections.abc import Sequence

import pytest
import torch

from megatron_ring.errors import ConfigError
from megatron_ring.inference.generation import Speed, generate
from megatron_ring.inference.sampling import Sampler

VOCABULARY = 20
END = 0


class Counting:
    """A model in whose text each token is followed by the next number; it keeps its tokens."""

    def new_cache(self, samples: int, capacity: Sequence[int]) -> list[list[int]]:
        self.capacity = list(capacity)
        return [[] for _ in range(samples)]

    def prefill(self, tokens, cache, chunk_size=0, on_chunk=None) -> torch.Tensor:
        for sample, prompt in zip(cache, tokens, strict=True):
            sample.extend(prompt)
        if on_chunk:
            on_chunk(sum(map(len, tokens)), sum(map(len, tokens)))
        self.chunk_size = chunk_size
        return self.logits(cache)

    def decode(self, tokens, cache) -> torch.Tensor:
        for sample, token in zip(cache, tokens, strict=True):
            if token is not None:
                sample.append(token)
        for sample, most in zip(cache, self.capacity):
            assert len(sample) <= most
        self.cache = cache
        return self.logits(cache)

    def logits(self, cache) -> torch.Tensor:
        logits_BV = torch.zeros(len(cache), VOCABULARY)
        for row, sample in enumerate(cache):
            logits_BV[row, (sample[-1] + 1) % VOCABULARY] = 5
        return logits_BV


def test_each_prompt_of_a_batch_ends_on_its_own():
    core = Counting()
    prompts = [[17], [1, 2, 3], [18, 19]]
    seen, chunks, speed = [], [], Speed()
    found = generate(
        core,
        prompts,
        6,
        Sampler(),
        {END},
        prefill_chunk_size=4,
        on_token=lambda row, token: seen.append((row, token)),
        on_chunk=lambda done, total: chunks.append((done, total)),
        speed=speed,
    )
    assert [generated.tokens for generated in found] == [[18, 19], [4, 5, 6, 7, 8, 9], []]
    reasons = [generated.stop_reason for generated in found]
    assert reasons == ["end of document", "length", "end of document"]
    assert seen[:4] == [(0, 18), (1, 4), (0, 19), (1, 5)]
    assert chunks == [(6, 6)]
    assert core.chunk_size == 4
    # Neither the last new token nor the end of a document is fed.
    assert core.cache == [[17, 18, 19], [1, 2, 3, 4, 5, 6, 7, 8], [18, 19]]
    assert (speed.prefill_tokens, speed.decode_tokens) == (6, 2 + 2 + 1 + 1 + 1)
    assert speed.decode_seconds > 0
    assert "decode 7 tokens" in str(speed)


def test_the_caller_can_stop_a_row():
    found = generate(
        Counting(), [[1], [2]], 8, Sampler(), should_stop=lambda row, tokens: tokens[-1] == 5
    )
    assert [generated.tokens for generated in found] == [[2, 3, 4, 5], [3, 4, 5]]
    assert {generated.stop_reason for generated in found} == {"stopped"}


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_samples_do_not_depend_on_the_batch(batch):
    prompts = [[3], [3, 4], [9, 8, 7]]
    sampler = Sampler(temperature=2.0, seed=11)
    apart = [
        generate(Counting(), [prompt], 12, sampler, numbers=[number])[0].tokens
        for number, prompt in enumerate(prompts)
    ]
    together = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        numbers = range(start, start + len(some))
        together += [
            generated.tokens
            for generated in generate(Counting(), some, 12, sampler, numbers=numbers)
        ]
    assert together == apart
    assert len({tuple(tokens) for tokens in apart}) == 3


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=1.0, top_p=0.9)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error(sampler, value):
    class Overflowing(Counting):
        def decode(self, tokens, cache) -> torch.Tensor:
            logits_BV = super().decode(tokens, cache)
            logits_BV[1, 3] = value
            return logits_BV

    with pytest.raises(ConfigError, match="prompt 7 at position 3 .*--dtype"):
        generate(Overflowing(), [[4], [5, 6]], 3, sampler, numbers=[6, 7])
