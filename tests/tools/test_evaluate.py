"""tools/evaluate.py: its losses are those of the run and of a plain model; files and errors."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ring.checkpoint import store
from megatron_ring.checkpoint.tensors import WEIGHT, Tensors
from megatron_ring.data.dataset import Dataset
from megatron_ring.errors import ConfigError, MegatronRingError
from megatron_ring.inference.scoring import check_memory
from megatron_ring.model.gpt import GPT
from megatron_ring.monitoring.outputs import PNG
from tests import programs
from tests.distributed import run_ranks
from tests.inference import models
from tests.model.conftest import plain_attention
from tools import evaluate

PROGRAM = programs.ROOT / "tools" / "evaluate.py"
CONFIG = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2}
data:
  data_path: text/tokens
  split: [0.5, 0.4, 0.1]
  seq_length: 63
  packing: greedy
  reset_attention_mask: true
  reset_position_ids: true
  eod_mask_loss: true
training: {train_iters: 4, lr: 0.01, min_lr: 0.001, eval_interval: 4, eval_iters: 5, dtype: fp32}
parallel: {context_parallel: striped}
checkpoint: {save: runs}
logging: {metrics_file: metrics.jsonl}
"""


def run_program(folder: Path, flags: list[str], program: Path = PROGRAM, config: str = "") -> list:
    """Run a program on two ranks and return the exit codes and what rank 0 has printed."""
    port = programs.free_port()
    ranks = [
        programs.start_rank(rank, port, folder, flags, program, config=config) for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    return [*(rank.returncode for rank in ranks), outputs[0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which a short run has saved its checkpoint and metrics."""
    folder = programs.working_folder(tmp_path_factory.mktemp("runs"), CONFIG)
    *codes, output = run_program(folder, [], programs.PROGRAM, "small.yaml")
    assert codes == [0, 0], output
    return folder


def evaluated(folder: Path, flags: list[str]) -> dict:
    """Evaluate in one process and return the results."""
    return run_ranks(1, evaluated_by_rank, folder, flags)[0]


def evaluated_by_rank(rank: int, world_size: int, folder: Path, flags: list[str]) -> dict:
    os.chdir(folder)
    command = evaluate.parse(["positions", "--load", "runs", "--dtype", "fp32", *flags])
    evaluate.evaluate_command(command, models.environment(rank, world_size))
    return json.loads(Path(command.positions.output).read_text())


def test_the_loss_over_all_positions_is_the_validation_loss_of_the_run(folder):
    (curve,) = evaluated(folder, [])["curves"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    *_, last = (record for record in map(json.loads, lines) if "validation_loss" in record)
    total = curve["total"]
    assert curve["samples"] == 5
    assert total["loss"] == pytest.approx(last["validation_loss"], abs=1e-5)
    assert total["bits_per_byte"] == pytest.approx(last["validation_bits_per_byte"], abs=1e-5)


def plain_losses(folder: Path, documents: str, length: int, samples: int) -> torch.Tensor:
    """Sums and counts of losses by context, (length + 1, 2), by a model that is not split."""
    (path,) = (folder / "runs").glob("step-*")
    run = store.read_config(path)
    tensors = Tensors.open(path)
    model = GPT(run.model, len(tensors.read("embedding.weight", WEIGHT)), 63, plain_attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors.read(name, WEIGHT))
    data = replace(
        run.data,
        data_path=(str(folder / run.data.data_path[0]),),
        seq_length=length,
    )
    dataset = Dataset.open(data, run.training.seed)
    end = dataset.tokenizer.end_of_document
    sums = torch.zeros(length + 1, 2, dtype=torch.float64)
    for index in range(samples):
        sample = torch.from_numpy(dataset.validation.sample(index))
        texts = [sample]
        if documents == "separated":
            ends = (sample[:-1] == end).nonzero()[:, 0].tolist()
            starts = [0, *(e + 1 for e in ends)]
            # The last target of a document is the first token of the next one.
            texts = [sample[a : b + 1] for a, b in zip(starts, [*starts[1:], length]) if b > a]
        for text in texts:
            tokens, targets = text[:-1], text[1:]
            with torch.no_grad():
                filled = torch.where(tokens < 0, end, tokens)
                logits = model(filled[None], torch.arange(len(tokens)))[0]
            losses = torch.nn.functional.cross_entropy(
                logits, targets, ignore_index=-100, reduction="none"
            )
            counted = (tokens != end) & (targets != -100) & (tokens != -100)
            context = torch.arange(1, len(tokens) + 1)
            sums.index_add_(
                0,
                context[counted],
                torch.stack(
                    [losses[counted].double(), torch.ones(int(counted.sum()), dtype=torch.float64)],
                    1,
                ),
            )
    return sums


def test_two_ranks_evaluate_lengths_and_kinds_of_documents(folder):
    flags = ["--load", "runs", "--dtype", "fp32", "--lengths", "63", "30", "--samples", "4"]
    flags += ["--documents", "joined", "separated", "long", "--output", "all/results.json"]
    flags += ["--bucket-width", "8"]
    *codes, output = run_program(folder, ["positions", *flags])
    assert codes == [0, 0], output
    results = json.loads((folder / "all/results.json").read_text())
    assert (folder / "all/results.png").read_bytes().startswith(PNG)
    assert results["ring_size"] == 2
    curves = {(curve["documents"], curve["length"]): curve for curve in results["curves"]}
    assert len(curves) == 6
    for (documents, length), curve in curves.items():
        buckets = curve["buckets"]
        assert f"length {length}, documents {documents}, 4 samples" in output
        assert [bucket["first"] for bucket in buckets] == list(range(1, length + 1, 8))
        assert buckets[-1]["last"] == length
        assert sum(bucket["tokens"] for bucket in buckets) == curve["total"]["tokens"]
        if documents == "long":
            assert all(b["tokens"] == 4 * (b["last"] - b["first"] + 1) for b in buckets)
            continue
        sums = plain_losses(folder, documents, length, 4)
        for bucket in buckets:
            loss, tokens = sums[bucket["first"] : bucket["last"] + 1].sum(0).tolist()
            assert bucket["tokens"] == tokens
            assert bucket["loss"] == pytest.approx(loss / tokens, abs=1e-5) if tokens else True


@pytest.mark.parametrize(
    ("flags", "texts"),
    [
        (["--lengths", "64"], ["lengths has 64", "63 positions", "--seq-length"]),
        (["--lengths", "0"], ["lengths has 0", "at least 1"]),
        (["--lengths", "9", "9"], ["9 more than once"]),
        (["--samples", "-1"], ["samples -1", "at least 0"]),
        (["--output", "small.yaml"], ["must end in .json", "--output small.json"]),
        (["--output", "text/tokens.json"], ["would be overwritten", "--output"]),
        (["--prefill-chunk-size", "8"], ["prefill_chunk_size 8", "--prefill-chunk-size"]),
        (["--load", "nothing"], ["nothing does not exist", "--load"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_options_are_refused_before_weights_are_read(flags, texts, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(evaluate.OpenedModel, "load", None)
    command = evaluate.parse(["positions", "--load", "runs", *flags])
    with pytest.raises(MegatronRingError) as error:
        run_ranks_here(command)
    assert error.value.exit_code in (2, 4)
    for text in texts:
        assert text in str(error.value)


def run_ranks_here(command) -> None:
    """Check a command as rank 0 of one process."""
    opened = evaluate.open_model(command.inference, 1)
    command.plan(opened)
    command.files.check()


def test_a_dry_run_prints_the_plan_and_writes_nothing(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    flags = ["--load", "runs", "--dry-run", "--world-size", "2", "--output", "dry.json"]
    evaluate.main(evaluate.parse(["positions", *flags]), models.environment(0, 1))
    output = capsys.readouterr().out
    assert "2 processes = 2 ring x 1 tensor" in output
    assert "memory           per rank: " in output
    assert not Path("dry.json").exists()


def test_a_picture_that_is_not_completed_leaves_the_previous_one(tmp_path):
    files = evaluate.ResultFiles(tmp_path / "a.json", "positions")
    files.write({"model": "first"}, lambda picture: picture.write_bytes(b"whole"))

    def draw_half(picture: Path) -> None:
        picture.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(ConfigError, match="--output"):
        files.write({"model": "second"}, draw_half)
    assert files.picture.read_bytes() == b"whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_more_memory_than_there_is_is_refused():
    needed = evaluate.RankMemory(weights=3 << 30, cache=0, activations=2 << 30, logits=1 << 30)
    check_memory(needed, None, "")
    check_memory(needed, 5 << 30, "")
    with pytest.raises(ConfigError) as error:
        check_memory(needed, 4 << 30, "--lengths")
    for text in ("5.00 GiB", "3.00 GiB", "4.00 GiB", "--lengths"):
        assert text in str(error.value)


def test_data_that_does_not_fit_is_refused(folder):
    refused = run_ranks(1, refused_by_rank, folder)[0]
    assert "no document has the 2001 tokens" in refused["long"]
    assert "--lengths to at most" in refused["long"]
    assert "--lengths 5000 from --part validation" in refused["short part"]
    assert "another tokenizer" in refused["tokenizer"]
    assert "--data-path" in refused["tokenizer"]


def refused_by_rank(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    os.chdir(folder)
    from tools import prepare_data

    prepare = ["--input", "pages", "--vocab-size", "290", "--output-prefix", "other/tokens"]
    prepare_data.main(prepare)
    cases = {
        "long": ["--documents", "long", "--lengths", "2000", "--seq-length", "2000"],
        "short part": ["--lengths", "5000", "--seq-length", "5000"],
        "tokenizer": ["--data-path", "other/tokens"],
    }
    found = {}
    for name, flags in cases.items():
        command = evaluate.parse(["positions", "--load", "runs", *flags])
        with pytest.raises(MegatronRingError) as error:
            evaluate.evaluate_command(command, models.environment(rank, world_size))
        found[name] = str(error.value)
        assert error.value.exit_code == 3
    return found
