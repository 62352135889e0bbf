"""Retrieval: prompts have their length, depth and answer, and answers count as greedy decoding."""

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_ring.config import NeedlesConfig
from megatron_ring.data.retrieval import TASKS, WORDINGS
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.errors import ConfigError
from megatron_ring.inference.loading import load
from megatron_ring.inference.needle_plot import draw_heatmap
from megatron_ring.inference.needles import (
    Cell,
    Prompt,
    PromptWriter,
    accuracy_table,
    correct_answer_tokens,
)
from megatron_ring.monitoring.outputs import PNG
from tests.distributed import run_ranks
from tests.inference import models
from tests.model.conftest import plain_attention
from tools import evaluate


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(models.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module", params=["text", "needles"])
def writer(request, tokenizer) -> PromptWriter:
    config = NeedlesConfig(haystack=request.param, wording="pair", needles=3)
    return PromptWriter(config, tokenizer, begin=(7,))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_prompt_has_its_length_and_its_first_needle_at_its_depth(writer, task, depth):
    length = 600
    prompt = writer.write(task, length, depth, 0)
    assert prompt.tokens[0] == 7
    missing = length - len(prompt.tokens) - len(prompt.answer)
    assert 0 <= missing < 100  # less than the line that did not fit
    problem = TASKS[task](WORDINGS["pair"], 3, writer.random(task, length, depth, 0))
    text = writer.tokenizer.decode(prompt.tokens[1:])
    assert text.endswith(problem.question)
    assert writer.tokenizer.decode(prompt.answer) == problem.answer
    body = "\n" + text[: -len(problem.question)]
    assert all(body.count("\n" + line) == 1 for line in problem.needles)
    place = body.index("\n" + problem.needles[0]) / len(body)
    assert place == pytest.approx(depth, abs=0.2)
    ordered = [body.index("\n" + line) for line in problem.needles]
    assert ordered == sorted(ordered)


def test_prompts_depend_on_seed_and_number_and_nothing_else(writer, tokenizer):
    again = PromptWriter(writer.config, tokenizer, begin=(7,))
    first = writer.write("keys", 300, 0.3, 0)
    writer.write("keys", 300, 0.3, 1)
    assert again.write("keys", 300, 0.3, 0) == first
    assert again.write("keys", 300, 0.3, 1) != first


def test_a_needle_longer_than_its_context_is_one_error(writer):
    with pytest.raises(ConfigError) as caught:
        writer.check("values", 12, 0.5, 0)
    (problem,) = caught.value.problems
    least = int(problem.split("--lengths to at least ")[1].split(",")[0])
    assert "length 12" in problem
    assert 12 < least < 80
    with pytest.raises(ConfigError):
        writer.write("values", 12, 0.5, 0)


def greedy(model, tokens: list[int], count: int) -> list[int]:
    answer: list[int] = []
    for _ in range(count):
        context = torch.tensor([tokens + answer])
        with torch.no_grad():
            logits_1SV = model(context, torch.arange(context.shape[1]))
        answer.append(int(logits_1SV[0, -1].argmax()))
    return answer


def judged_by_rank(rank: int, world_size: int, folder: Path) -> list[list[bool]]:
    loaded = load(models.options(folder), models.environment(rank, world_size))
    model = models.random_model()
    for block in model.blocks.values():
        block.attention.attention = plain_attention
    prompts = []
    for tokens in ([3, 1, 4], [1, 5, 9, 2, 6, 5, 3]):
        answer = greedy(model, tokens, 4)
        wrong = [*answer[:2], (answer[2] + 1) % models.VOCABULARY, answer[3]]
        prompts += [Prompt(tokens, answer), Prompt(tokens, wrong)]
    return correct_answer_tokens(loaded, prompts)


def test_an_answer_is_right_where_greedy_decoding_gives_it(tmp_path):
    models.write_checkpoint(tmp_path, models.random_model())
    by_rank = run_ranks(2, judged_by_rank, tmp_path)
    assert by_rank[0] == by_rank[1]
    right, wrong, right_too, wrong_too = by_rank[0]
    assert right == right_too == [True] * 4
    assert wrong[:3] == wrong_too[:3] == [True, True, False]


LONG = 256
FLAGS = ["--dtype", "fp32", "--tasks", "single", "values", "--wording", "pair"]
FLAGS += ["--depths", "3", "--samples", "2", "--needles", "2"]


def evaluated_by_rank(rank: int, world_size: int, folder: Path) -> tuple[dict, list[str]]:
    """Return the results of the program, and the messages of lengths that it refuses."""
    os.chdir(folder)
    environment = models.environment(rank, world_size)
    flags = ["needles", "--load", "model", "--tokenizer-model", "tokenizer.model", *FLAGS]
    refused = []
    for lengths in (["8"], ["300"]):
        command = evaluate.parse([*flags, "--lengths", *lengths, "--output", "none.json"])
        with pytest.raises(ConfigError) as caught:
            evaluate.evaluate_command(command, environment)
        refused.append(str(caught.value))
    evaluate.evaluate_command(evaluate.parse([*flags, "--lengths", "256", "128"]), environment)
    return json.loads(Path("needles.json").read_text()), refused


def test_the_program_writes_each_cell_and_refuses_lengths_that_do_not_fit(tmp_path):
    models.write_tokenizer(tmp_path)
    model = models.random_model(models.LLAMA, models.TOKENIZER_IDS, LONG)
    models.write_checkpoint(tmp_path / "model", model, seq_length=LONG)
    results, refused = run_ranks(2, evaluated_by_rank, tmp_path)[0]
    cells = results["cells"]
    assert [(cell["task"], cell["length"], cell["depth"]) for cell in cells] == [
        (task, length, depth)
        for task in ("single", "values")
        for length in (128, LONG)
        for depth in (0, 0.5, 1)
    ]
    assert all(cell["samples"] == 2 and cell["accuracy"] == 0 for cell in cells)
    assert results["wording"] == "pair"
    assert (tmp_path / "needles.png").read_bytes().startswith(PNG)
    assert not (tmp_path / "none.json").exists()
    too_short, too_long = refused
    assert "length 8" in too_short
    assert "--lengths" in too_short
    assert "300" in too_long
    assert "256 positions" in too_long


CELLS = [
    Cell("keys", length, depth, samples=4, correct=correct, answer_tokens=8, correct_tokens=7)
    for length, depth, correct in [(64, 0.0, 4), (64, 1.0, 2), (128, 0.0, 1), (128, 1.0, 0)]
]


def test_the_table_has_depths_in_rows_and_lengths_in_columns():
    lines = [line.split() for line in accuracy_table(CELLS, "keys").splitlines()]
    assert lines == [
        ["keys", "64", "128"],
        ["0%", "100%", "25%"],
        ["100%", "50%", "0%"],
        ["mean", "75.0%", "12.5%"],
    ]


def test_the_heatmap_is_a_picture(tmp_path):
    draw_heatmap(CELLS, tmp_path / "cells.png")
    assert (tmp_path / "cells.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"samples": 0}, "--samples"),
        ({"depths": 1}, "--depths"),
        ({"lengths": (64, 0)}, "--lengths"),
        ({"lengths": (64, 64)}, "--lengths"),
        ({"tasks": ()}, "--tasks"),
        ({"needles": 0}, "--needles"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_bad_options_name_their_flag(changes, flag):
    (problem,) = NeedlesConfig(**changes).problems()
    assert flag in problem
