"""Retrieval over context length and depth: the needle test in the manner of RULER.

A prompt of a given length hides needles in a haystack and ends with a question (data/retrieval.py).
It is answered if greedy decoding continues it with exactly the tokens of the answer. Decoding need
not run for that: it yields the answer if and only if each of its tokens is the most probable one
after those before it, which one forward pass over prompt and answer decides (scoring.py).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_ring.config import NeedlesConfig
from megatron_ring.config.needles import NeedleTask
from megatron_ring.data.retrieval import (
    TASKS,
    WORDINGS,
    Problem,
    Wording,
    library_texts,
    needle_lines,
    text_lines,
)
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.errors import ConfigError
from megatron_ring.inference.loading import Loaded, OpenedModel
from megatron_ring.inference.scoring import token_log_likelihoods

_DEFAULT_LENGTHS = 4


@dataclass(frozen=True)
class Prompt:
    """Tokens up to the end of the question, and the tokens of the answer after it."""

    tokens: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Cell:
    """The questions of one task at one length and depth.

    depth: where in the haystack the first needle is, from 0 to 1. correct: answered exactly, of
    ``samples``. answer_tokens, correct_tokens: of all answers; a token counts as correct if it is
    chosen after the right ones before it.
    """

    task: NeedleTask
    length: int
    depth: float
    samples: int
    correct: int
    answer_tokens: int
    correct_tokens: int

    @property
    def accuracy(self) -> float:
        """The share of questions that are answered exactly."""
        return self.correct / self.samples


@dataclass(frozen=True)
class _EncodedProblem:
    """The tokens of a problem's lines, its question and its answer."""

    needles: list[list[int]]
    others: list[list[int]]
    question: list[int]
    answer: list[int]


class PromptWriter:
    """Writes prompts of an exact task, length and depth with the tokens of ``tokenizer``.

    Each depends on the seed, the task, its length, depth and number only. ``begin`` are the ids
    before a text.
    """

    def __init__(self, config: NeedlesConfig, tokenizer: Tokenizer, begin: tuple[int, ...] = ()):
        self.config = config
        self.tokenizer = tokenizer
        self.begin = list(begin)
        self.wording: Wording = WORDINGS[config.wording]
        self._texts = library_texts() if config.haystack == "text" else []

    def write(self, task: NeedleTask, length: int, depth: float, number: int) -> Prompt:
        """Return a prompt that has at most ``length`` tokens together with its answer.

        It is shorter by less than a line of the haystack. Raises ConfigError as ``check`` does.
        """
        random = self.random(task, length, depth, number)
        problem = TASKS[task](self.wording, self.config.needles, random)
        parts = self._encode_problem(problem)
        room = self._room(task, length, parts)
        haystack = self._haystack(problem, room, random)
        lines = _hide(haystack, parts.needles, parts.others, depth, random)
        before_question = [token for line in lines for token in line]
        return Prompt(self.begin + before_question + parts.question, parts.answer)

    def check(self, task: NeedleTask, length: int, depth: float, number: int) -> None:
        """Raise ConfigError if needles, question and answer alone are longer than ``length``."""
        random = self.random(task, length, depth, number)
        problem = TASKS[task](self.wording, self.config.needles, random)
        self._room(task, length, self._encode_problem(problem))

    def random(
        self, task: NeedleTask, length: int, depth: float, number: int
    ) -> np.random.Generator:
        """Return the generator of a prompt, which draws the problem first."""
        key = [self.config.seed, list(TASKS).index(task), length, round(depth * 1000), number]
        return np.random.default_rng(key)

    def _encode_problem(self, problem: Problem) -> "_EncodedProblem":
        question = self._encode(problem.question)
        both = self._encode(problem.question + problem.answer)
        # A tokenizer may merge across the boundary; the answer then begins a token earlier.
        shared = 0
        while shared < len(question) and question[shared] == both[shared]:
            shared += 1
        return _EncodedProblem(
            needles=[self._encode(line) for line in problem.needles],
            others=[self._encode(line) for line in problem.others],
            question=both[:shared],
            answer=both[shared:],
        )

    def _room(self, task: NeedleTask, length: int, parts: "_EncodedProblem") -> int:
        """Return how many tokens of haystack there may be."""
        needles = sum(map(len, [*parts.needles, *parts.others]))
        asked = len(parts.question) + len(parts.answer)
        least = len(self.begin) + needles + asked
        if least > length:
            raise ConfigError(
                f"a prompt of task {task} has {least} tokens without any haystack, more than the "
                f"length {length}: its needles have {needles}, question and answer {asked}. Set "
                f"--lengths to at least {least}, or --needles to fewer."
            )
        return length - least

    def _haystack(
        self, problem: Problem, room: int, random: np.random.Generator
    ) -> list[list[int]]:
        """Return the tokens of lines that have at most ``room`` tokens in all."""
        if self.config.haystack == "text":
            lines = text_lines(self._texts, random)
        else:
            lines = needle_lines(self.wording, problem.used_keys, random)
        chosen: list[list[int]] = []
        for line in lines:
            tokens = self._encode(line)
            room -= len(tokens)
            if room < 0:
                return chosen
            chosen.append(tokens)
        raise AssertionError("lines never end")

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)


def _hide(
    haystack: list[list[int]],
    needles: list[list[int]],
    others: list[list[int]],
    depth: float,
    random: np.random.Generator,
) -> list[list[int]]:
    """Return the lines of a haystack with needles among them.

    The first needle is before the line at ``depth``, in tokens; the following ones are anywhere
    after it, in their order. ``others`` are anywhere.
    """
    ends = np.cumsum([0, *map(len, haystack)])
    first = int(np.searchsorted(ends, depth * ends[-1]))
    later = np.sort(random.integers(first, len(haystack) + 1, len(needles) - 1))
    elsewhere = random.integers(0, len(haystack) + 1, len(others))
    before: dict[int, list[list[int]]] = {}
    for place, needle in zip([first, *later, *elsewhere], [*needles, *others]):
        before.setdefault(int(place), []).append(needle)
    lines = []
    for place in range(len(haystack) + 1):
        lines += before.get(place, [])
        lines += haystack[place : place + 1]
    return lines


@dataclass(frozen=True)
class NeedlesPlan:
    """What is evaluated, known before the weights are read."""

    config: NeedlesConfig
    lengths: tuple[int, ...]
    writer: PromptWriter

    @staticmethod
    def of(config: NeedlesConfig, opened: OpenedModel) -> "NeedlesPlan":
        """Resolve the options for a model. Raises ConfigError with all problems."""
        problems = config.problems()
        lengths = config.lengths or _default_lengths(opened.trained_length)
        problems += [
            f"lengths has {length}, and the model has {opened.seq_length} positions. Set --lengths "
            f"to at most {opened.seq_length}, or --seq-length, which a model with RoPE can extend."
            for length in lengths
            if length > opened.seq_length
        ]
        wording = WORDINGS[config.wording]
        if config.needles >= len(wording.keys):
            problems.append(
                f"needles {config.needles} must be below the {len(wording.keys)} keys of wording "
                f"{config.wording}. Set --needles."
            )
        if problems:
            raise ConfigError(problems)
        writer = PromptWriter(config, opened.text.required(), opened.text.begin)
        plan = NeedlesPlan(config, tuple(sorted(lengths)), writer)
        for task, length, depth in plan.cells():
            for number in range(config.samples):
                writer.check(task, length, depth, number)
        return plan

    @property
    def depths(self) -> list[float]:
        """Depths from 0 to 1."""
        return [float(depth) for depth in np.linspace(0, 1, self.config.depths)]

    def cells(self) -> Iterator[tuple[NeedleTask, int, float]]:
        """Yield task, length and depth of each cell, in the order of the results."""
        for task in self.config.tasks:
            for length in self.lengths:
                for depth in self.depths:
                    yield task, length, depth


def _default_lengths(trained: int) -> tuple[int, ...]:
    return tuple(trained >> power for power in reversed(range(_DEFAULT_LENGTHS)))


def evaluate_needles(
    plan: NeedlesPlan, loaded: Loaded, on_cell: Callable[[int], object] | None = None
) -> list[Cell]:
    """Return the results of all cells, on every rank. Collective; blocks.

    ``on_cell`` is called after each cell with 1.
    """
    cells = []
    for task, length, depth in plan.cells():
        prompts = [
            plan.writer.write(task, length, depth, number) for number in range(plan.config.samples)
        ]
        cells.append(_cell(task, length, depth, correct_answer_tokens(loaded, prompts)))
        if on_cell:
            on_cell(1)
    return cells


def correct_answer_tokens(loaded: Loaded, prompts: list[Prompt]) -> list[list[bool]]:
    """Return for each prompt which tokens of its answer greedy decoding would choose."""
    scores = token_log_likelihoods(loaded, [prompt.tokens + prompt.answer for prompt in prompts])
    return [
        score.is_greedy[-len(prompt.answer) :].tolist() for score, prompt in zip(scores, prompts)
    ]


def _cell(task: NeedleTask, length: int, depth: float, correct: list[list[bool]]) -> Cell:
    return Cell(
        task,
        length,
        round(depth, 4),
        samples=len(correct),
        correct=sum(map(all, correct)),
        answer_tokens=sum(map(len, correct)),
        correct_tokens=sum(map(sum, correct)),
    )


def mean_accuracy(cells: Iterable[Cell]) -> float:
    """Return the share of questions of all cells that are answered exactly."""
    cells = list(cells)
    return sum(cell.correct for cell in cells) / sum(cell.samples for cell in cells)


def accuracy_table(cells: list[Cell], task: NeedleTask) -> str:
    """Return the accuracies of a task in percent: depths in rows, lengths in columns."""
    of_task = [cell for cell in cells if cell.task == task]
    lengths = sorted({cell.length for cell in of_task})
    accuracy = {(cell.length, cell.depth): cell.accuracy for cell in of_task}
    rows = [f"{task:>9} " + "".join(f"{length:>9,}" for length in lengths)]
    for depth in sorted({cell.depth for cell in of_task}):
        values = "".join(f"{accuracy[length, depth]:>9.0%}" for length in lengths)
        rows.append(f"{depth:>9.0%} " + values)
    means = [mean_accuracy(c for c in of_task if c.length == length) for length in lengths]
    return "\n".join([*rows, f"{'mean':>9} " + "".join(f"{mean:>9.1%}" for mean in means)])
