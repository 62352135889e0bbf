"""Noise by counter, and the distribution that is sampled."""

import math

import pytest
import torch

from megatron_ring.inference.sampling import Sampler, gumbel_noise, philox

# Known answers of Random123's kat_vectors for philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, expected):
    found = philox(tuple(torch.tensor([word]) for word in words(counter)), tuple(words(key)))
    assert [int(word) for word in found] == words(expected)


def test_noise_depends_on_seed_prompt_position_and_token_and_on_nothing_else():
    base = gumbel_noise(1, 2, 3, 101)
    assert torch.equal(base, gumbel_noise(1, 2, 3, 101))
    assert torch.equal(base[:7], gumbel_noise(1, 2, 3, 7))
    for other in ((2, 2, 3), (1 << 40, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert (gumbel_noise(*other, 101) != base).all()
    assert len(base.unique()) == 101


def test_noise_has_the_moments_of_a_standard_gumbel_distribution():
    noise = torch.cat([gumbel_noise(5, 0, position, 1000) for position in range(200)])
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def frequencies(sampler: Sampler, logits_V: torch.Tensor, draws: int) -> torch.Tensor:
    """Return how often each token is chosen, over positions."""
    chosen = [sampler.choose(logits_V[None], [0], [position])[0] for position in range(draws)]
    return torch.bincount(torch.tensor(chosen), minlength=len(logits_V)) / draws


LOGITS = torch.tensor([1.0, 3.0, 2.0, 2.0, -1.0, 0.0])


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [
        (Sampler(temperature=1.0), range(6)),
        (Sampler(temperature=0.5), range(6)),
        (Sampler(temperature=1.0, top_k=1), [1]),
        (Sampler(temperature=1.0, top_k=2), [1, 2, 3]),  # two are equal
        (Sampler(temperature=1.0, top_k=6), range(6)),
        (Sampler(temperature=1.0, top_k=100), range(6)),
        (Sampler(temperature=2.0, top_p=0.6), [1, 2, 3]),
        (Sampler(temperature=1.0, top_p=0.01), [1]),
        (Sampler(temperature=1.0, top_k=4, top_p=0.9), [1, 2, 3]),
    ],
)
def test_tokens_are_sampled_from_the_softmax_of_those_kept(sampler, kept):
    draws = 3000
    expected = torch.zeros(6)
    kept = list(kept)
    expected[kept] = (LOGITS[kept] / sampler.temperature).softmax(0)
    found = frequencies(sampler, LOGITS, draws)
    assert (found[expected == 0] == 0).all()
    assert (found - expected).abs().max() < 4 * 0.5 / draws**0.5


def test_the_choice_of_a_row_does_not_depend_on_the_others():
    logits_BV = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(temperature=1.0, top_p=0.95, seed=7)
    together = sampler.choose(logits_BV, [4, 5, 6], [10, 3, 8])
    apart = [
        sampler.choose(logits_BV[row : row + 1], [prompt], [position])[0]
        for row, (prompt, position) in enumerate([(4, 10), (5, 3), (6, 8)])
    ]
    assert together == apart


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-320])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_temperature_of_0_is_greedy_and_the_lowest_ones_are_nearly(temperature, top_p):
    logits_BV = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0], [-9.0, -5.0, -2.0]])
    sampler = Sampler(temperature=temperature, top_p=top_p)
    assert sampler.choose(logits_BV, [0, 1, 2], [0, 0, 0]) == [1, 0, 2]
