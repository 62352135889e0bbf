"""The first step of `make demo-needles`: a model on two ranks learns to retrieve."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import programs
from tools.make_retrieval_documents import Options, main

TOOLS = programs.ROOT / "tools"
LENGTH = 64
# A guess among the values in the prompt, of which its 21 lines state 10 or more.
CHANCE = 1 / 10


def run_two_ranks(folder: Path, program: Path, flags: list[str], config: str) -> str:
    port = programs.free_port()
    ranks = [
        programs.start_rank(rank, port, folder, flags, program, config=config) for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs[0]
    return outputs[0]


@pytest.mark.whole
def test_a_small_model_retrieves_five_times_as_often_as_by_chance(tmp_path):
    main(Options(tmp_path / "short.jsonl", documents=16_000, lines=(12, 22), haystack_share=0))
    prepare = [sys.executable, TOOLS / "prepare_data.py", "--input", "short.jsonl"]
    prepare += ["--vocab-size", "512", "--output-prefix", "data/short"]
    subprocess.run(prepare, cwd=tmp_path, check=True)
    recipe = str(programs.ROOT / "configs" / "needles.yaml")
    learn = ["--data-path", "data/short", "--save", "runs", "--eval-interval", "0"]
    run_two_ranks(tmp_path, programs.PROGRAM, learn, recipe)
    ask = ["needles", "--load", "runs", "--tasks", "keys", "--lengths", str(LENGTH)]
    ask += ["--wording", "pair", "--haystack", "needles", "--samples", "10"]
    run_two_ranks(tmp_path, TOOLS / "evaluate.py", ask, "")
    cells = json.loads((tmp_path / "needles.json").read_text())["cells"]
    correct = sum(cell["correct"] for cell in cells) / sum(cell["samples"] for cell in cells)
    assert len(cells) == 11
    assert correct >= 5 * CHANCE
