"""Chooses the next token from logits: greedy, or sampled by temperature, top-k and top-p.

The noise of a token is a function of the seed, the number of the prompt, the position and the token
id, and of nothing else. So the same text comes out on any number of ranks and in any batch, unless
two candidates are within rounding of each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Philox-4x32 with 10 rounds: multipliers of the counter and increments of the key (Salmon et al.
# 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3 and table 2; Random123's
# philox.h).
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW_32 = 0xFFFFFFFF
_WORDS = 4

Counter = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Sampler:
    """Chooses tokens; ``temperature`` 0 is greedy.

    Attributes:
        top_k: sample from the k most probable tokens; 0 for all.
        top_p: sample from the fewest tokens whose probability is at least this (nucleus sampling,
            Holtzman et al. 2020, section 3.1); applied after ``top_k``.
        seed: at least 0, below 2^63.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def choose(
        self, logits_BV: torch.Tensor, prompts: Sequence[int], positions: Sequence[int]
    ) -> list[int]:
        """Return a token id for each row; blocks until the device has computed it.

        ``prompts`` are the numbers of the rows' prompts, ``positions`` those of the tokens to be
        chosen in their sequences. Tokens of equal scores are kept or dropped together.
        """
        if self.temperature == 0:
            return logits_BV.argmax(-1).tolist()
        scores_BV = logits_BV.double()
        # The largest becomes 0: however low the temperature, no quotient overflows to infinity.
        scores_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)) / self.temperature
        scores_BV = _keep_top_p(_keep_top_k(scores_BV, self.top_k), self.top_p)
        noise_BV = torch.stack(
            [
                gumbel_noise(self.seed, prompt, position, scores_BV.shape[1], scores_BV.device)
                for prompt, position in zip(prompts, positions, strict=True)
            ]
        )
        # The largest of scores plus Gumbel noise is a sample of their softmax (Gumbel 1954).
        return (scores_BV + noise_BV).argmax(-1).tolist()


def _keep_top_k(scores_BV: torch.Tensor, top_k: int) -> torch.Tensor:
    if not 0 < top_k < scores_BV.shape[1]:
        return scores_BV
    smallest_B1 = scores_BV.topk(top_k).values[:, -1:]
    return scores_BV.masked_fill(scores_BV < smallest_B1, -torch.inf)


def _keep_top_p(scores_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    if top_p >= 1:
        return scores_BV
    sorted_BV = scores_BV.sort(descending=True).values
    probabilities_BV = sorted_BV.softmax(-1)
    before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
    # The first token is always kept, because no probability is before it.
    kept_BV = before_BV < top_p
    smallest_B1 = sorted_BV.masked_fill(~kept_BV, torch.inf).min(-1, keepdim=True).values
    return scores_BV.masked_fill(scores_BV < smallest_B1, -torch.inf)


def gumbel_noise(
    seed: int, prompt: int, position: int, vocab_size: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return standard Gumbel noise for each token id, float64 (V,)."""
    blocks = torch.arange(-(-vocab_size // _WORDS), device=device)
    counter = (
        blocks,
        torch.full_like(blocks, position & _LOW_32),
        torch.full_like(blocks, prompt & _LOW_32),
        torch.zeros_like(blocks),
    )
    words = philox(counter, (seed & _LOW_32, seed >> 32 & _LOW_32))
    uniform = (torch.stack(words, dim=1).flatten()[:vocab_size].double() + 0.5) / 2**32
    return -torch.log(-torch.log(uniform))


def philox(counter: Counter, key: tuple[int, int]) -> Counter:
    """Return the four random words of each counter; all words are int64 from 0 to 2^32 - 1."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(c0, _MULTIPLIERS[0])
        high_1, low_1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 = k0 + _KEY_INCREMENTS[0] & _LOW_32
        k1 = k1 + _KEY_INCREMENTS[1] & _LOW_32
    return c0, c1, c2, c3


def _multiply(word: torch.Tensor, by: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the upper and lower 32 bits of a product of 32-bit words, without overflow."""
    low = word * (by & 0xFFFF)
    high = word * (by >> 16)
    sum_of_low = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (sum_of_low >> 32), sum_of_low & _LOW_32
