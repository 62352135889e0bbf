"""Commands that rank 0 gives to all ranks of a model: load, score, generate, stop.

For programs that only rank 0 runs, such as lm-eval. The other ranks wait in ``Ranks.follow``.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_ring.config import InferenceConfig
from megatron_ring.inference.console import opening_lines
from megatron_ring.inference.generation import generate
from megatron_ring.inference.loading import Loaded, open_model
from megatron_ring.inference.memory import Work, available_bytes, memory_lines, rank_memory
from megatron_ring.inference.model import InferenceModel
from megatron_ring.inference.sampling import Sampler
from megatron_ring.inference.scoring import check_memory, token_log_likelihoods
from megatron_ring.parallel.consensus import Consensus, abort_collectively, run_checked
from megatron_ring.parallel.environment import Environment

# Followers wait for rank 0 while it reads data sets and computes metrics, for as long as it takes.
_LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True)
class Load:
    """Load the model of these options."""

    config: InferenceConfig


@dataclass(frozen=True)
class Score:
    """Return the scores of these sequences."""

    sequences: list[list[int]]


@dataclass(frozen=True)
class Generate:
    """Continue a batch of prompts until a stop text, an end of document or ``max_new_tokens``."""

    prompts: list[list[int]]
    numbers: list[int]
    max_new_tokens: int
    sampler: Sampler
    until: list[str]


@dataclass(frozen=True)
class Stop:
    """Leave ``follow``."""


Command = Load | Score | Generate | Stop


class Ranks:
    """Runs commands on all ranks together. Every rank creates one; this is collective.

    Rank 0 calls ``run`` and ``stop``, the others ``follow``.
    """

    def __init__(self, environment: Environment):
        self.environment = environment
        self.consensus = Consensus.build()
        self._commands = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        self._loaded: Loaded | None = None
        self._core: InferenceModel | None = None
        self._chunk_size = 0
        self._is_running = False

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank gives the commands."""
        return self.environment.global_rank == 0

    @property
    def loaded(self) -> Loaded:
        """The model, after ``Load``."""
        assert self._loaded is not None, "a model must be loaded first"
        return self._loaded

    def run(self, command: Command, on_done: Callable[[int], object] | None = None) -> Any:
        """Run a command on all ranks and return its result; called on rank 0 only; blocks.

        ``on_done`` is called with the number of sequences done. Raises the command's
        MegatronRingError, which all ranks raise.
        """
        assert self.is_rank_zero
        dist.broadcast_object_list([command], src=0, group=self._commands)
        return self._run(command, on_done)

    def stop(self) -> None:
        """End ``follow`` on all other ranks, unless a command has failed; called on rank 0."""
        if not self.has_failed:
            dist.broadcast_object_list([Stop()], src=0, group=self._commands)

    @property
    def has_failed(self) -> bool:
        """Whether an exception has left a command, after which the ranks cannot communicate."""
        return self._is_running

    def follow(self) -> None:
        """Run the commands of rank 0 until ``Stop``; for all other ranks."""
        while True:
            received: list[Command | None] = [None]
            dist.broadcast_object_list(received, src=0, group=self._commands)
            if isinstance(received[0], Stop):
                return
            self._run(received[0])

    def _run(self, command: Command, on_done: Callable[[int], object] | None = None) -> Any:
        # No command may follow an exception within one. One that all ranks raise ends them
        # together; after any other the launcher ends those that still wait.
        self._is_running = True
        with abort_collectively():
            result = self._execute(command, on_done)
        self._is_running = False
        return result

    def _execute(self, command: Command, on_done: Callable[[int], object] | None) -> Any:
        if isinstance(command, Load):
            return self._load(command.config)
        if isinstance(command, Generate):
            return self._generate(command)
        done = 0

        def on_pack(scored: int, total: int) -> None:
            nonlocal done
            if on_done:
                on_done(scored - done)
            done = scored

        return token_log_likelihoods(self.loaded, command.sequences, on_pack)

    def _load(self, config: InferenceConfig) -> Loaded:
        opened = open_model(config, self.environment.world_size, self.consensus)
        run_checked(self.consensus, opened.text.required)
        work = Work((opened.seq_length,), 1, config.prefill_chunk_size)
        needed = rank_memory(opened, work)
        available = available_bytes(opened.settings.device, self.environment.local_size)
        if self.is_rank_zero:
            lines = [*opening_lines(opened), *memory_lines(opened, work, available)]
            print(*lines, sep="\n", file=sys.stderr, flush=True)
        remedy = "seq_length in --model_args to fewer positions"
        run_checked(self.consensus, lambda: check_memory(needed, available, remedy))
        self._chunk_size = config.prefill_chunk_size
        self._loaded = opened.load(self.environment, self.consensus)
        return self._loaded

    def _generate(self, command: Generate) -> list[str]:
        loaded = self.loaded
        if self._core is None:
            self._core = InferenceModel.of(loaded)

        def should_stop(row: int, tokens: list[int]) -> bool:
            text = loaded.text.decode(tokens)
            return any(term and term in text for term in command.until)

        generated = generate(
            self._core,
            command.prompts,
            command.max_new_tokens,
            command.sampler,
            loaded.text.ends,
            numbers=command.numbers,
            prefill_chunk_size=self._chunk_size,
            should_stop=should_stop,
        )
        return [loaded.text.decode(each.tokens) for each in generated]
