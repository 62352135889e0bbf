"""Prefill and decoding on real ranks: logits equal those of a full forward on one process."""

import functools
import weakref
from typing import NamedTuple

import pytest
import torch

from megatron_ring.errors import ConfigError
from megatron_ring.inference import cache as cache_module
from megatron_ring.inference.model import InferenceModel
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.grid import Grid
from tests.distributed import run_ranks
from tests.inference.core_models import (
    LENGTH,
    MODELS,
    VOCABULARY,
    build,
    full_logits,
    inference_model,
    prompt,
)

# Generated after the first prompt and after the second.
FORCED = prompt(100, 7)
FORCED_AFTER_SECOND = prompt(101, 2)


class Case(NamedTuple):
    """A batch of prompts, tokens after them, second prompts, and tokens after these.

    Attributes:
        lengths: of the first prompts.
        second: of the second prompts; () for none.
    """

    model: str
    lengths: tuple[int, ...]
    layout: str = "striped"
    stripe: int = 1
    chunk: int = 0
    second: tuple[int, ...] = ()
    kernel: str = "sdpa"

    def texts(self) -> list[list[int]]:
        """All tokens of each sample."""
        texts = [[*prompt(i, length), *FORCED] for i, length in enumerate(self.lengths)]
        for i, length in enumerate(self.second):
            texts[i] += [*prompt(10 + i, length), *FORCED_AFTER_SECOND]
        return texts

    def ends(self, sample: int) -> list[int]:
        """The positions of the sample's tokens whose logits are returned."""
        first = self.lengths[sample]
        ends = list(range(first - 1, first + len(FORCED)))
        if self.second:
            second = first + len(FORCED) + self.second[sample]
            ends += range(second - 1, second + len(FORCED_AFTER_SECOND))
        return ends


LAYOUTS = [("striped", 1), ("striped", 3), ("ring", 1), ("zigzag", 1)]
UNEQUAL = (13, 1, 6)
EVERY_MODEL = [Case(model, UNEQUAL, chunk=5, second=(2, 7, 1)) for model in MODELS]
EVERY_LAYOUT = [
    Case(model, UNEQUAL, *layout, chunk, second=(2, 7, 1))
    for layout in LAYOUTS[1:]
    for model, chunk in [("llama", 0), ("gpt-oss", 5), ("gpt2", 4)]
]
LENGTHS = [
    *(Case("llama", (length,), second=(1,)) for length in (1, 2, 3, 9)),
    Case("gpt-oss", (1, 2)),
]
CHUNKS = [Case("qwen", (7,), chunk=chunk, second=(4,)) for chunk in range(1, 8)]
KERNELS = [Case("gpt-oss", (5, 3), chunk=6, second=(1, 1), kernel="reference")]
# Weights and vocabulary are split, and the rows of the vocabulary unevenly.
TENSOR = [Case(model, (5, 2), chunk=4, second=(1, 3)) for model in ("llama", "gpt-oss", "gpt2")]

GRIDS = {
    1: {Grid(): [*EVERY_MODEL, *EVERY_LAYOUT[:3], *LENGTHS, *CHUNKS[:2]]},
    2: {Grid(ring=2): [*EVERY_MODEL, *EVERY_LAYOUT[:3], *LENGTHS]},
    3: {Grid(ring=3): [*EVERY_MODEL, *LENGTHS, *CHUNKS]},
    4: {
        Grid(ring=4): [*EVERY_MODEL, *EVERY_LAYOUT, *LENGTHS, *KERNELS],
        Grid(ring=2, tensor=2): TENSOR,
        Grid(tensor=4): [Case("gpt2", (3, 1))],
    },
}


class Result(NamedTuple):
    """One rank's result of a case.

    Attributes:
        logits: logits_BV of each call.
        entries: of each sample, in the first layer that stores all keys; None if there is none.
    """

    logits: list[torch.Tensor]
    entries: list[int] | None


def run_case(case: Case, groups: ProcessGroups) -> Result:
    model = inference_model(
        case.model, groups, layout_name=case.layout, stripe_size=case.stripe, kernel=case.kernel
    )
    samples = len(case.lengths)
    cache = model.new_cache(samples, [len(text) for text in case.texts()])
    firsts = [prompt(i, length) for i, length in enumerate(case.lengths)]
    logits = [model.prefill(firsts, cache, case.chunk)]
    logits += [model.decode([token] * samples, cache) for token in FORCED]
    if case.second:
        seconds = [prompt(10 + i, length) for i, length in enumerate(case.second)]
        logits.append(model.prefill(seconds, cache, case.chunk))
        logits += [model.decode([token] * samples, cache) for token in FORCED_AFTER_SECOND]
    full = [layer for layer, window in cache.shape.windows.items() if not window]
    entries = [kv.entries for kv in cache.layers[full[0]]] if full else None
    return Result(logits, entries)


def on_real_ranks(rank: int, world_size: int) -> dict[tuple[Grid, Case], Result]:
    with pytest.MonkeyPatch.context() as patch:
        # Small enough for the buffers of windowed layers to be compacted, and replaced.
        patch.setattr(cache_module, "_FREE_ENTRIES", 1)
        results = {}
        for grid, cases in GRIDS[world_size].items():
            groups = ProcessGroups.build(grid, rank)
            for case in cases:
                results[grid, case] = run_case(case, groups)
        return results


@functools.cache
def results(world_size: int) -> list[dict[tuple[Grid, Case], Result]]:
    """The results of every rank."""
    return run_ranks(world_size, on_real_ranks) if world_size > 1 else [on_real_ranks(0, 1)]


ALL = [
    pytest.param(grid, case, id=f"{grid.ring}x{grid.tensor}-{'-'.join(map(str, case))}")
    for grids in GRIDS.values()
    for grid, cases in grids.items()
    for case in cases
]


@pytest.mark.parametrize(("grid", "case"), ALL)
def test_logits_equal_those_of_a_full_forward(grid, case):
    for sample, text in enumerate(case.texts()):
        expected = full_logits(case.model, text)[case.ends(sample)]
        for of_rank in results(grid.world_size):
            found = torch.stack([logits[sample] for logits in of_rank[grid, case].logits])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


STRIPED = [
    parameters
    for parameters in ALL
    if parameters.values[1][2:4] == ("striped", 1)
    and 0 in map(MODELS[parameters.values[1].model].window_of, range(2))
]


@pytest.mark.parametrize(("grid", "case"), STRIPED)
def test_a_striped_cache_is_balanced_to_one_token(grid, case):
    entries = [of_rank[grid, case].entries for of_rank in results(grid.world_size)]
    for sample, text in enumerate(case.texts()):
        of_ranks = [entries[rank][sample] for rank in range(grid.world_size)]
        assert sum(of_ranks) == len(text) * grid.tensor
        assert max(of_ranks) - min(of_ranks) <= 1


# ---- what one process suffices for ----


@pytest.fixture
def model() -> InferenceModel:
    return inference_model("gpt2", ProcessGroups())


def test_a_sample_without_a_token_stays_as_it_is(model):
    cache = model.new_cache(3, [8, 8, 8])
    model.prefill([[1, 2], [3], [4, 5]], cache)
    logits = model.decode([6, None, 7], cache)
    assert cache.lengths == [3, 1, 3]
    assert torch.equal(logits[1], torch.zeros(VOCABULARY))
    logits = model.decode([None, 8, None], cache)
    expected = full_logits("gpt2", [3, 8])[-1]
    torch.testing.assert_close(logits[1], expected, rtol=1e-5, atol=1e-5)


def test_progress_is_reported_after_every_chunk(model):
    seen = []
    cache = model.new_cache(2, [8, 8])
    model.prefill([[1, 2, 3], [4, 5]], cache, 2, lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("prompts", "numbers"),
    [
        ([[1], []], "sample 1"),
        ([[1] * 9, [1]], "9 more.* capacity of 8"),
        ([[1], [1] * (LENGTH + 1)], f"{LENGTH + 1} tokens.* {LENGTH} positions"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(prompts, numbers, model):
    cache = model.new_cache(2, [8, LENGTH + 8])
    with pytest.raises(ConfigError, match=numbers):
        model.prefill(prompts, cache)
    assert cache.lengths == [0, 0]


def test_a_token_beyond_the_capacity_is_refused(model):
    cache = model.new_cache(1, [2])
    model.prefill([[1, 2]], cache)
    with pytest.raises(ConfigError, match="--max-new-tokens"):
        model.decode([3], cache)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.3)])
def test_the_cache_has_the_dtype_of_the_weights(dtype, tolerance):
    model = InferenceModel(build("gpt2").to(dtype), ProcessGroups(), kernel="sdpa")
    cache = model.new_cache(1, [8])
    assert {kv.last(0).dtype for kvs in cache.layers.values() for kv in kvs} == {dtype}
    logits = [model.prefill([[1, 2, 3]], cache, 2), model.decode([4], cache)]
    assert {x.dtype for x in logits} == {torch.float32}
    expected = full_logits("gpt2", [1, 2, 3, 4])[2:]
    torch.testing.assert_close(torch.cat(logits), expected, rtol=0, atol=tolerance)


def test_a_cache_that_is_no_longer_used_is_freed(model):
    cache = model.new_cache(1, [8])
    model.prefill([[1, 2, 3]], cache)
    model.decode([4], cache)
    reference = weakref.ref(cache)
    del cache
    assert reference() is None
