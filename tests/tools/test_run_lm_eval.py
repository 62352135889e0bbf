"""lm-eval over a ring of two ranks gives what its own ``hf`` model gives on the exported model."""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import ByteLevelBPETokenizer

from megatron_ring.errors import ConfigError
from tests.data.text import TEXT
from tests.distributed import run_ranks
from tests.inference import models
from tests.programs import ROOT
from tools import convert_checkpoint, run_lm_eval

IDS = 280
POSITIONS = 64
END = "<|endoftext|>"
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "continued": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match"}],
    },
}
EXAMPLE = ROOT / "configs" / "lm_eval" / "python_syntax.yaml"
ALL_TASKS = [*TASKS, EXAMPLE.stem]
COMMAND = ["run", "--tasks", ",".join(ALL_TASKS), "--include_path", "tasks", "--log_samples"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint in ``runs``, its export in ``exported``, and the tasks."""
    folder = tmp_path_factory.mktemp("lm-eval")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=IDS, special_tokens=[END])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer/tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    ids = tokenizer.get_vocab_size()
    models.write_checkpoint(
        folder / "runs",
        models.random_model(vocab_size=ids, length=POSITIONS),
        seq_length=POSITIONS,
        end_of_document=tokenizer.token_to_id(END),
    )
    convert_checkpoint.main(
        [
            *("export", str(folder / "runs"), str(folder / "exported")),
            *("--tokenizer", str(folder / "tokenizer")),
        ]
    )
    words = TEXT.split()
    lines = [" ".join(words[n : n + 5]) for n in range(20)]
    documents = [
        {
            "question": lines[n],
            "choices": [lines[n + 1], lines[n + 2][:9], "x"],
            "answer": n % 3,
            # The first is longer than the model's positions.
            "text": "\n".join(lines[n : n + (12 if n == 0 else 2)]),
        }
        for n in range(4)
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (folder / "tasks").mkdir()
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(folder / "documents.jsonl")}}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": data}
        # YAML is a superset of JSON.
        text = json.dumps(common | {"test_split": "test"} | task)
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    # The example of docs/guide/evaluation.md, whose documents are found from the working directory.
    shutil.copy(EXAMPLE, folder / "tasks")
    shutil.copytree(EXAMPLE.parent, folder / EXAMPLE.parent.relative_to(ROOT))
    return folder


def on_ranks(rank: int, world_size: int, folder: Path) -> None:
    """Run lm-eval on the ring as its program does."""
    prepare_process(folder)
    options = "load=runs,tokenizer_model=tokenizer/tokenizer.json,dtype=fp32"
    model = ["--model", "megatron_ring", "--model_args", options, "--batch_size", "2"]
    sys.argv[1:] = [*COMMAND, *model, "--output_path", "ring"]
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        run_lm_eval.drive(run_lm_eval.Ranks(models.environment(rank, world_size)))
    lines = ("model            runs", "grid             2 processes", "memory           per rank")
    assert [f"{line}" in printed.getvalue() for line in lines] == [rank == 0] * 3


def alone(rank: int, world_size: int, folder: Path) -> None:
    """Run lm-eval with its own model."""
    prepare_process(folder)
    model = ["--model", "hf", "--model_args", "pretrained=exported,dtype=float32"]
    sys.argv[1:] = [*COMMAND, *model, "--device", "cpu", "--output_path", "alone"]
    run_lm_eval.cli_evaluate()


def prepare_process(folder: Path) -> None:
    os.chdir(folder)
    os.environ["HF_HOME"] = str(folder / f"cache-{os.getpid()}")
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, list]]:
    """The results and, by task, the responses of the model to each document."""
    (path,) = folder.rglob("results_*.json")
    responses = {}
    for task in ALL_TASKS:
        (samples,) = folder.rglob(f"samples_{task}_*.jsonl")
        records = sorted(
            map(json.loads, samples.read_text().splitlines()), key=lambda r: r["doc_id"]
        )
        responses[task] = [record["resps"] for record in records]
    return json.loads(path.read_text())["results"], responses


def numbers(value: Any) -> list[float]:
    """All numbers and booleans in nested lists; lm-eval writes those of responses as text."""
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [{"True": 1.0, "False": 0.0}.get(value) if value in ("True", "False") else float(value)]


@pytest.mark.whole
def test_the_ring_gives_the_results_of_the_hf_model(folder):
    run_ranks(2, on_ranks, folder)
    run_ranks(1, alone, folder)
    results, responses = read(folder / "ring")
    of_hf, responses_of_hf = read(folder / "alone")
    assert responses["continued"] == responses_of_hf["continued"]
    assert any(text for ((text,),) in responses["continued"])
    for task in ("choice", "rolling", EXAMPLE.stem):
        ours, theirs = numbers(responses[task]), numbers(responses_of_hf[task])
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert min(ours) < -20
    assert results.keys() == of_hf.keys() == set(ALL_TASKS)
    for task, metrics in of_hf.items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert results[task][name] == pytest.approx(value, rel=1e-5), (task, name)


def refused_on_rank_zero(rank: int, world_size: int) -> tuple[str, bool]:
    def cli() -> None:
        raise ConfigError("of rank 0 alone")

    run_lm_eval.cli_evaluate = cli
    ranks = run_lm_eval.Ranks(models.environment(rank, world_size))
    try:
        run_lm_eval.drive(ranks)
    except ConfigError as error:
        return str(error), ranks.has_failed
    return "", ranks.has_failed


def test_an_error_of_rank_zero_ends_the_other_ranks():
    outcomes = run_ranks(2, refused_on_rank_zero)
    assert outcomes == [("of rank 0 alone", False), ("", False)]


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"lode": "runs"}, ["lode", "load"]),
        ({"load": "runs", "stripe_size": "wide"}, ["stripe_size=wide", "int"]),
        ({"load": "runs", "context_parallel": "spiral"}, ["spiral", "zigzag"]),
        ({"load": "runs", "dry_run": True}, ["dry_run"]),
    ],
    ids=str,
)
def test_options_that_are_not_possible_are_refused(options, texts):
    from megatron_ring.inference.lm_eval_adapter import _config

    with pytest.raises(ConfigError) as error:
        _config(options)
    for text in ("--model_args", *texts):
        assert text in str(error.value)


@pytest.mark.parametrize("size", ["0", "many", "auto:4", -1])
def test_a_batch_size_that_is_not_possible_is_refused(size):
    from megatron_ring.inference.lm_eval_adapter import _parse_batch_size

    with pytest.raises(ConfigError) as error:
        _parse_batch_size(size)
    for text in (f"batch_size {size}", "auto", "--batch_size"):
        assert text in str(error.value)


def test_a_process_that_has_not_joined_others_is_refused():
    from megatron_ring.inference.lm_eval_adapter import MegatronRingLM

    with pytest.raises(ConfigError) as error:
        MegatronRingLM(load="runs")
    assert "tools/run_lm_eval.py" in str(error.value)
