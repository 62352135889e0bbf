"""Retrieval texts: needles and their questions, haystacks, and documents to train on."""

from itertools import islice

import numpy as np
import pytest

from megatron_ring.data.retrieval import (
    TASKS,
    WORDINGS,
    needle_lines,
    text_lines,
    training_document,
)


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", WORDINGS)
def test_keys_are_different_and_as_many_as_a_question_may_have(name):
    keys = WORDINGS[name].keys
    assert len(set(keys)) == len(keys) >= 32


@pytest.mark.parametrize("task", ["single", "keys"])
@pytest.mark.parametrize("name", WORDINGS)
def test_question_and_answer_repeat_the_first_needle_and_no_other(name, task):
    problem = TASKS[task](WORDINGS[name], 5, random())
    asked = problem.question + problem.answer
    (needle,) = problem.needles
    assert needle.startswith(asked)
    assert len(problem.others) == (4 if task == "keys" else 0)
    assert not any(other.startswith(problem.question) for other in problem.others)


@pytest.mark.parametrize("name", WORDINGS)
def test_all_values_of_a_key_are_asked_for_in_order(name):
    wording = WORDINGS[name]
    problem = TASKS["values"](wording, 4, random())
    (key,) = problem.used_keys
    values = problem.answer.strip().split(wording.separator)
    assert len(set(values)) == 4
    assert problem.needles == tuple(wording.state(key, value) for value in values)


def test_variables_are_a_chain_of_keys():
    problem = TASKS["variables"](WORDINGS["sentence"], 3, random())
    first, second, third = problem.answer.strip().split(", ")
    value = problem.question.split()[-3].rstrip(",")
    assert problem.needles == (
        f"The code of the {first} is {value}.\n",
        f"The code of the {second} is that of the {first}.\n",
        f"The code of the {third} is that of the {second}.\n",
    )


def test_a_haystack_of_needles_gives_each_other_key_one_value():
    wording = WORDINGS["pair"]
    left_out = frozenset(wording.keys[:2])
    lines = list(islice(needle_lines(wording, left_out, random()), 500))
    values = dict(line.split() for line in lines)
    assert set(values) == set(wording.keys) - left_out
    assert len(set(lines)) == len(values)


def test_lines_of_text_continue_with_the_next_text():
    lines = list(islice(text_lines(["a\nb\n", "c\n"], random()), 7))
    start = ["a\n", "b\n", "c\n"].index(lines[0])
    expected = (["a\n", "b\n", "c\n"] * 4)[start : start + 7]
    assert lines == expected


def test_a_document_repeats_its_own_needles():
    text = training_document(WORDINGS["pair"], 400, 0.3, iter(["# text\n"] * 400), 0.2, 1, random())
    lines = text.splitlines()
    assert len(lines) == 400
    assert 50 < lines.count("# text") < 110
    pairs = [line.split() for line in lines if line != "# text"]
    assert len({key for key, _ in pairs}) == len({tuple(pair) for pair in pairs}) == 32
    # 0.7 of the first lines and all after the last key are repetitions.
    assert len({tuple(pair) for pair in pairs[:40]}) == pytest.approx(0.3 * 40, abs=7)


def test_with_a_ratio_some_keys_are_repeated_more_often():
    def counts(ratio: float) -> list[int]:
        lines = training_document(WORDINGS["pair"], 4000, 0.9, None, 0, ratio, random()).split("\n")
        return sorted(lines.count(line) for line in set(lines[:-1]))

    assert counts(1)[-1] < 2 * counts(1)[0]
    assert counts(100)[-1] > 20 * counts(100)[0]
