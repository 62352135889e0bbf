"""Generates text with a trained model whose sequence and cache are split over a ring of ranks.

    deepspeed --num_gpus 4 tools/generate.py --load runs/mine --prompt-file book.txt
    torchrun --nproc-per-node 4 tools/generate.py --load HF_DIR --prompt "Once upon a time"
    python tools/generate.py --load runs/mine --prompts-jsonl in.jsonl --output out.jsonl

The model is a checkpoint written on any grid, or a Hugging Face folder. Texts and JSON go to
stdout, everything else to stderr.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import megatron_ring.parallel.interrupt_hook  # noqa: F401 (before slow imports)

# isort: split

from megatron_ring.config import GenerationConfig, InferenceConfig, parse_flags
from megatron_ring.errors import ConfigError, reporting_errors
from megatron_ring.inference import memory
from megatron_ring.inference.console import (
    JsonLines,
    PrefillBar,
    numbered,
    opening_lines,
    print_text,
    replace_unprintable_characters,
)
from megatron_ring.inference.generation import Generated, Speed, generate
from megatron_ring.inference.loading import Loaded, OpenedModel, open_model
from megatron_ring.inference.model import InferenceModel
from megatron_ring.inference.prompts import RESULT_KEYS, Prompt, check_lengths, read_prompts
from megatron_ring.inference.sampling import Sampler
from megatron_ring.inference.text_stream import TextStream
from megatron_ring.parallel.consensus import Consensus, abort_collectively, run_checked
from megatron_ring.parallel.entry_point import (
    arguments_of_user,
    read_files_as_utf8,
    report_ended_ranks,
    report_once,
)
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.rendezvous import TIMEOUT, join_processes, leave_processes
from megatron_ring.settings.precision import device_type


@dataclass(frozen=True)
class Options:
    """Generate text with a trained model, split over a ring of processes."""

    model: InferenceConfig = field(default_factory=InferenceConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    @property
    def has_prompts(self) -> bool:
        """Whether an option names any prompt."""
        given = self.generation
        return bool(given.prompt or given.prompt_file or given.prompts_jsonl)

    @property
    def streams(self) -> bool:
        """Whether text is printed as it comes, rather than written as JSON lines only."""
        return not (self.generation.prompts_jsonl or self.generation.output)

    def check(self) -> None:
        """Raise ConfigError with all problems that do not depend on the model."""
        if problems := [*self.model.problems(), *self.generation.problems()]:
            raise ConfigError(problems)


def main(options: Options, environment: Environment) -> None:
    """Print the plan of a dry run, or generate. Collective over all processes."""
    options.check()
    if options.model.dry_run:
        dry_run(options, environment)
        return
    join_processes(environment, device_type(), TIMEOUT)
    consensus = Consensus.build()
    with abort_collectively(), contextlib.ExitStack() as resources:
        opened = open_model(options.model, environment.world_size, consensus)
        prompts = consensus.run_on_rank_zero(lambda: read_and_check(options, opened))
        check_memory(options, opened, prompts, environment, consensus)
        writers: list[JsonLines] = []  # on rank 0 only
        consensus.run_on_rank_zero(lambda: writers.extend(open_writers(options)))
        for writer in writers:
            resources.enter_context(writer)
        loaded = opened.load(environment, consensus)
        run(options, loaded, prompts, writers)
    leave_processes()


def dry_run(options: Options, environment: Environment) -> None:
    """Print the model, the grid and the memory of a rank; of the prompts, if any are given."""
    world_size = options.model.world_size or environment.world_size
    opened = open_model(options.model, world_size)
    new = options.generation.max_new_tokens
    lengths = [max(1, opened.seq_length - new)] * options.generation.batch_size
    if options.has_prompts:
        lengths = [len(prompt.tokens) for prompt in read_and_check(options, opened)]
    available = memory.available_bytes(opened.settings.device, world_size)
    work = largest_work(options, opened, lengths)
    if environment.global_rank:
        return
    print(*opening_lines(opened), *memory.memory_lines(opened, work, available), sep="\n")
    try:
        memory.check_fits(opened, work, available)
    except ConfigError as error:
        print(f"warning          {error}")


def read_and_check(options: Options, opened: OpenedModel) -> list[Prompt]:
    """Read the prompts; raise ConfigError or DataError if one cannot be continued."""
    prompts = read_prompts(options.generation, opened.text)
    has_rope = opened.model_config.position_embedding_type == "rope"
    check_lengths(
        prompts,
        options.generation.max_new_tokens,
        opened.seq_length,
        extensible=has_rope or opened.seq_length < opened.trained_length,
    )
    return prompts


def largest_work(options: Options, opened: OpenedModel, lengths: Sequence[int]) -> memory.Work:
    """Return the batch that needs the most memory."""
    generation = options.generation
    works = [
        memory.Work(
            batch,
            generation.max_new_tokens,
            options.model.prefill_chunk_size,
            samples=generation.temperature > 0,
        )
        for batch in memory.batches_of(lengths, generation.batch_size)
    ]
    return max(works, key=lambda work: memory.rank_memory(opened, work).total)


def check_memory(
    options: Options,
    opened: OpenedModel,
    prompts: Sequence[Prompt],
    environment: Environment,
    consensus: Consensus,
) -> None:
    """Print the memory of a rank, and raise ConfigError on every rank if one has less."""
    work = largest_work(options, opened, [len(prompt.tokens) for prompt in prompts])
    available = memory.available_bytes(opened.settings.device, environment.local_size)
    if environment.global_rank == 0:
        lines = [*opening_lines(opened), *memory.memory_lines(opened, work, available)]
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    run_checked(consensus, lambda: memory.check_fits(opened, work, available))


def open_writers(options: Options) -> list[JsonLines]:
    """Open the output before anything is computed; none if texts are printed as they come."""
    return [] if options.streams else [JsonLines(options.generation.output)]


def run(
    options: Options, loaded: Loaded, prompts: Sequence[Prompt], writers: Sequence[JsonLines]
) -> None:
    """Generate batch by batch. Collective over all processes; rank 0 prints and writes."""
    generation = options.generation
    is_rank_zero = loaded.consensus.rank == 0
    replace_unprintable_characters()
    core = InferenceModel.of(loaded)
    sampler = Sampler(generation.temperature, generation.top_k, generation.top_p, generation.seed)
    speed = Speed()
    for start in range(0, len(prompts), generation.batch_size):
        batch = prompts[start : start + generation.batch_size]
        numbers = [prompt.number for prompt in batch]
        texts = [Text(loaded, prompt, options.streams and is_rank_zero) for prompt in batch]
        of_batch = generate(
            core,
            [prompt.tokens for prompt in batch],
            generation.max_new_tokens,
            sampler,
            loaded.text.ends,
            numbers=numbers,
            prefill_chunk_size=options.model.prefill_chunk_size,
            on_token=add_to(texts) if is_rank_zero else ignore,
            on_chunk=PrefillBar(f"prefill of {numbered(numbers)}") if is_rank_zero else None,
            speed=speed,
        )
        results = list(zip(batch, texts, of_batch, strict=True))
        loaded.consensus.run_on_rank_zero(lambda: finish(results, writers))  # noqa: B023
    if is_rank_zero:
        print(f"speed            {speed}", file=sys.stderr, flush=True)


def finish(
    results: Sequence[tuple[Prompt, "Text", Generated]], writers: Sequence[JsonLines]
) -> None:
    """Print or write what a batch has generated; raise DataError if it cannot be written."""
    for prompt, text, generated in results:
        text.finish()
        for writer in writers:
            writer.write(record(prompt, text, generated))


def ignore(row: int, token: int) -> None:
    """Do nothing with a token; for the ranks that print nothing."""


class Text:
    """The text that continues a prompt, printed as it comes if ``prints``."""

    def __init__(self, loaded: Loaded, prompt: Prompt, prints: bool):
        self._stream = TextStream(loaded.text.decode, prompt.tokens)
        self._prints = prints
        self.value = ""

    def add(self, token: int) -> None:
        """Add a token."""
        self._append(self._stream.add(token))

    def finish(self) -> None:
        """Add what no token has completed, and end the line."""
        self._append(self._stream.finish())
        if self._prints:
            print_text("\n")

    def _append(self, piece: str) -> None:
        self.value += piece
        if self._prints and piece:
            print_text(piece)


def add_to(texts: Sequence[Text]) -> Callable[[int, int], None]:
    """Return a function that adds a token to the text of a row."""
    return lambda row, token: texts[row].add(token)


def record(prompt: Prompt, text: Text, generated: Generated) -> dict[str, Any]:
    """Return the JSON object of a prompt."""
    tokens = generated.tokens
    results = (text.value, tokens, len(prompt.tokens), len(tokens), generated.stop_reason)
    return {
        **prompt.extra,
        "prompt": prompt.text,
        **dict(zip(RESULT_KEYS, results, strict=True)),
    }


if __name__ == "__main__":
    read_files_as_utf8()
    with reporting_errors():
        environment = Environment.read()
    with report_once(environment):
        options = parse_flags(Options(), arguments_of_user(), console=environment.global_rank == 0)
        with report_ended_ranks(environment):
            main(options, environment)
