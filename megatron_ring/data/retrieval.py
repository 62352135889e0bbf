"""Texts that state facts and then ask for them: the needles of long-context evaluation.

A *needle* is a line that gives a value to a key. It is hidden among other lines, the *haystack*,
and a *question* after them, the beginning of such a line, is to be continued with the value. The
tasks are those of RULER (Hsieh et al. 2024, section 3) in a form for models that continue text and
follow no instructions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from megatron_ring.data.corpus import python_library


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Short, common and different words, so that most tokenizers have a token for each.
_THINGS = _words(
    """apple bell boat book bread brush cart chair clock coat coin cup desk drum fan flag fork glove
    hat key knife lamp map nail net pen pipe ring rope shoe spoon wheel"""
)
_PLACES = _words(
    """attic bank barn bay beach bridge cave city coast dam dock farm field fort garden hill hotel
    house island lake mill moon park pond port river road school shop street tower valley"""
)
_COLOURS = _words(
    """amber azure black blue bronze brown coral cream crimson gold gray green indigo ivory khaki
    lilac lime maroon navy ochre olive orange pearl pink purple red rose rust silver teal violet
    white"""
)


@dataclass(frozen=True)
class Wording:
    """How needles and questions are phrased, and which keys and values there are.

    A question ends where its answer begins; answers begin with a space. Templates have the fields
    ``key``, ``value`` and, in ``link``, ``other``, a key that has been given a value before.
    """

    keys: tuple[str, ...]
    value: Callable[[np.random.Generator], str]
    statement: str
    question: str
    question_of_all_values: str
    link: str
    question_of_keys: str
    separator: str

    def state(self, key: str, value: str) -> str:
        """Return the line that gives ``value`` to ``key``."""
        return self.statement.format(key=key, value=value)


def _six_digits(random: np.random.Generator) -> str:
    return str(random.integers(100_000, 1_000_000))


def _place(random: np.random.Generator) -> str:
    return _PLACES[random.integers(len(_PLACES))]


WORDINGS = {
    "sentence": Wording(
        keys=tuple(" ".join(words) for words in product(_COLOURS, _THINGS)),
        value=_six_digits,
        statement="The code of the {key} is {value}.\n",
        question="The code of the {key} is",
        question_of_all_values="All codes of the {key}, in order:",
        link="The code of the {key} is that of the {other}.\n",
        question_of_keys="All that have the code {value}, in order:",
        separator=", ",
    ),
    "pair": Wording(
        keys=_THINGS,
        value=_place,
        statement="{key} {value}\n",
        question="{key}",
        question_of_all_values="all {key}",
        link="{key} as {other}\n",
        question_of_keys="all as {value}",
        separator=" ",
    ),
}
"""sentence: values of six digits, for models trained on text. pair: two words a line, the densest
that a question can be, for small models trained on such lines."""


@dataclass(frozen=True)
class Problem:
    """Needles to hide, in order, and a question about them; ``answer`` continues ``question``.

    ``used_keys`` must not be stated elsewhere in the text. The first needle is the one whose depth
    is measured: with it, or with it and those after it, the question can be answered.
    """

    needles: tuple[str, ...]
    others: tuple[str, ...]
    question: str
    answer: str
    used_keys: frozenset[str]


def single(wording: Wording, count: int, random: np.random.Generator) -> Problem:
    """One needle; ``count`` is ignored."""
    return keys(wording, 1, random)


def keys(wording: Wording, count: int, random: np.random.Generator) -> Problem:
    """``count`` keys with a value each, of which one is asked for."""
    chosen = _choose_keys(wording, count, random)
    values = _different_values(wording, count, random)
    lines = [wording.state(key, value) for key, value in zip(chosen, values)]
    question = wording.question.format(key=chosen[0])
    return Problem((lines[0],), tuple(lines[1:]), question, f" {values[0]}", frozenset(chosen))


def values(wording: Wording, count: int, random: np.random.Generator) -> Problem:
    """One key with ``count`` values, all asked for in their order."""
    (key,) = _choose_keys(wording, 1, random)
    chosen = _different_values(wording, count, random)
    lines = tuple(wording.state(key, value) for value in chosen)
    question = wording.question_of_all_values.format(key=key)
    answer = f" {wording.separator.join(chosen)}"
    return Problem(lines, (), question, answer, frozenset([key]))


def variables(wording: Wording, count: int, random: np.random.Generator) -> Problem:
    """``count`` keys, each with the value of the one before it, all of which are asked for."""
    chosen = _choose_keys(wording, count, random)
    (value,) = _different_values(wording, 1, random)
    links = [wording.link.format(key=key, other=other) for other, key in pairwise(chosen)]
    lines = (wording.state(chosen[0], value), *links)
    question = wording.question_of_keys.format(value=value)
    answer = f" {wording.separator.join(chosen)}"
    return Problem(lines, (), question, answer, frozenset(chosen))


TASKS: dict[str, Callable[[Wording, int, np.random.Generator], Problem]] = {
    "single": single,
    "keys": keys,
    "values": values,
    "variables": variables,
}
"""The tasks by name; each makes a problem of ``count`` keys, values or variables."""


def _choose_keys(wording: Wording, count: int, random: np.random.Generator) -> list[str]:
    numbers = random.choice(len(wording.keys), count, replace=False)
    return [wording.keys[number] for number in numbers]


def _different_values(wording: Wording, count: int, random: np.random.Generator) -> list[str]:
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        chosen[wording.value(random)] = None
    return list(chosen)


def needle_lines(
    wording: Wording, left_out: frozenset[str], random: np.random.Generator
) -> Iterator[str]:
    """Yield endless needles of other keys than ``left_out``, each key with one value throughout."""
    names = [key for key in wording.keys if key not in left_out]
    given = {key: wording.value(random) for key in names}
    while True:
        key = names[random.integers(len(names))]
        yield wording.state(key, given[key])


def library_texts() -> list[str]:
    """Return the texts of the default corpus, Python's standard library."""
    files = python_library().files
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return [text for text in texts if text]


def text_lines(texts: Sequence[str], random: np.random.Generator) -> Iterator[str]:
    """Yield the lines of the texts, endlessly, from a random line on."""
    number = int(random.integers(len(texts)))
    lines = texts[number].splitlines(keepends=True)
    lines = lines[int(random.integers(len(lines))) :]
    while True:
        yield from lines
        number = (number + 1) % len(texts)
        lines = texts[number].splitlines(keepends=True)


def training_document(
    wording: Wording,
    lines: int,
    new_share: float,
    haystack: Iterator[str] | None,
    haystack_share: float,
    popularity_ratio: float,
    random: np.random.Generator,
) -> str:
    """Return a document that asks for its own needles again and again.

    Each of its ``lines`` is, with probability ``haystack_share``, one of ``haystack``; of the
    others, a share ``new_share`` gives a value to a new key, and the rest repeat the line of an
    earlier key. The most popular key is repeated up to ``popularity_ratio`` times as often as the
    least popular one, so that values are retrieved from all distances: popular ones from near,
    others from far.
    """
    weights = popularity_ratio ** random.random(len(wording.keys))
    unused = list(random.permutation(np.array(wording.keys, dtype=object)))
    stated: list[str] = []
    document = []
    for _ in range(lines):
        if haystack and random.random() < haystack_share:
            document.append(next(haystack))
        elif unused and (not stated or random.random() < new_share):
            stated.append(wording.state(unused.pop(), wording.value(random)))
            document.append(stated[-1])
        else:
            shares = np.cumsum(weights[: len(stated)])
            document.append(stated[np.searchsorted(shares, random.random() * shares[-1])])
    return "".join(document)
