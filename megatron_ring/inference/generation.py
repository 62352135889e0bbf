"""Generation: prefill a batch of prompts, then one token at a time until each of them has ended.

Logits may differ between ranks by rounding, so rank 0 chooses the tokens for all.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_ring.errors import ConfigError
from megatron_ring.inference.sampling import Sampler

END_OF_DOCUMENT = "end of document"
LENGTH = "length"
STOPPED = "stopped"

_NO_TOKEN = -1  # where the logits are nan or infinite


class Core(Protocol):
    """A model with a key-value cache, as InferenceModel is; every method is collective."""

    def new_cache(self, samples: int, capacity: Sequence[int]) -> Any:
        """Allocate a cache for so many tokens of each sample."""

    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        cache: Any,
        chunk_size: int = 0,
        on_chunk: Callable[[int, int], object] | None = None,
    ) -> torch.Tensor:
        """Append prompts; return logits_BV of their last tokens."""

    def decode(self, tokens: Sequence[int | None], cache: Any) -> torch.Tensor:
        """Append a token to each sample that has one; return logits_BV."""


@dataclass
class Speed:
    """Tokens and seconds of prefill, and of decoding after each prompt's first new token."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def count(self, is_prefill: bool, tokens: Sequence[Sequence[int]], started: float) -> float:
        """Add tokens that have been computed since ``started``; return the time now."""
        now = time.perf_counter()
        if is_prefill:
            self.prefill_tokens += sum(map(len, tokens))
            self.prefill_seconds += now - started
        else:
            self.decode_tokens += sum(map(len, tokens))
            self.decode_seconds += now - started
        return now

    def __str__(self) -> str:
        prefill = _rate("prefill", self.prefill_tokens, self.prefill_seconds)
        return f"{prefill}, {_rate('decode', self.decode_tokens, self.decode_seconds)}"


def _rate(name: str, tokens: int, seconds: float) -> str:
    per_second = f" ({tokens / seconds:,.1f} tokens/s)" if tokens and seconds else ""
    return f"{name} {tokens:,} tokens in {seconds:.2f} s{per_second}"


@dataclass(frozen=True)
class Generated:
    """The new tokens of a prompt, without the one that ended the document, and why they end."""

    tokens: list[int]
    stop_reason: str


def cache_capacity(prompt_tokens: int, max_new_tokens: int) -> int:
    """Return the tokens of a sequence that are cached: the last new one is not."""
    return prompt_tokens + max_new_tokens - 1


@torch.no_grad()
def generate(
    core: Core,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    ends: Collection[int] = (),
    *,
    numbers: Sequence[int] | None = None,
    prefill_chunk_size: int = 0,
    should_stop: Callable[[int, list[int]], bool] = lambda row, tokens: False,
    on_token: Callable[[int, int], object] = lambda row, token: None,
    on_chunk: Callable[[int, int], object] | None = None,
    speed: Speed | None = None,
) -> list[Generated]:
    """Continue a batch of prompts, given as token ids. Collective over all processes; blocks.

    Args:
        ends: ids of which each ends a document.
        numbers: of the prompts, for the noise of sampling; by default their places in the batch.
        should_stop: called on every rank after each new token with the row and all its new tokens;
            must return the same on every rank.
        on_token: called with the row and the token for each new one that is not an end.
        on_chunk: called with the prompts' tokens that are done, and all of them.
        speed: what this call takes is added to it.

    Raises ConfigError as the core does, for prompts that are empty or do not fit, and for logits
    that are nan or infinite.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    speed = Speed() if speed is None else speed
    started = time.perf_counter()
    cache = core.new_cache(
        len(prompts), [cache_capacity(len(prompt), max_new_tokens) for prompt in prompts]
    )
    logits_BV = core.prefill(prompts, cache, prefill_chunk_size, on_chunk)
    new: list[list[int]] = [[] for _ in prompts]
    reasons: list[str | None] = [None] * len(prompts)
    rows = list(range(len(prompts)))
    in_prefill = True
    while True:
        positions = [len(prompts[row]) + len(new[row]) for row in rows]
        chosen = _choose(sampler, logits_BV[rows], [numbers[row] for row in rows], positions)
        started = speed.count(in_prefill, prompts if in_prefill else [chosen], started)
        in_prefill = False
        for row, token in zip(rows, chosen, strict=True):
            if token in ends:
                reasons[row] = END_OF_DOCUMENT
                continue
            new[row].append(token)
            on_token(row, token)
            if should_stop(row, new[row]):
                reasons[row] = STOPPED
            elif len(new[row]) == max_new_tokens:
                reasons[row] = LENGTH
        if all(reasons):
            return [Generated(tokens, reason) for tokens, reason in zip(new, reasons, strict=True)]
        rows = [row for row, reason in enumerate(reasons) if reason is None]
        logits_BV = core.decode(
            [tokens[-1] if reason is None else None for tokens, reason in zip(new, reasons)], cache
        )


def _choose(
    sampler: Sampler, logits_BV: torch.Tensor, numbers: list[int], positions: list[int]
) -> list[int]:
    """Return the tokens that rank 0 chooses. Broadcasts over all processes and blocks.

    Raises ConfigError on every rank if logits are nan or infinite on rank 0.
    """
    tokens = sampler.choose(logits_BV, numbers, positions)
    is_finite_B = logits_BV.amax(-1).isfinite().tolist()
    tokens = [token if is_finite else _NO_TOKEN for token, is_finite in zip(tokens, is_finite_B)]
    tokens = _agreed(tokens, logits_BV.device)
    if _NO_TOKEN in tokens:
        row = tokens.index(_NO_TOKEN)
        raise ConfigError(
            f"the logits of prompt {numbers[row]} at position {positions[row]} are nan or "
            "infinite, although the weights are not: the dtype's range does not hold its "
            "activations. Set --dtype bf16 or fp32."
        )
    return tokens


def _agreed(tokens: list[int], device: torch.device) -> list[int]:
    """Return the tokens of rank 0. Broadcasts over all processes and blocks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tokens
    of_rank_zero = torch.tensor(tokens, device=device)
    dist.broadcast(of_rank_zero, src=0)
    return of_rank_zero.tolist()
