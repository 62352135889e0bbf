"""Warm-up and min_lr of a resumed run: auto keeps the checkpoint's; no default refuses a run."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_ring.checkpoint import store
from megatron_ring.config import Config, TrainingConfig, load_yaml
from megatron_ring.errors import ConfigError
from megatron_ring.training.schedule import Schedule, learning_rate
from megatron_ring.training.start import resolve_schedule
from tests.checkpoint.small import write
from tests.forked import Forked
from tests.parallel.single_process import SingleProcessConsensus
from tests.programs import PROGRAM, working_folder

SMALL = """\
model: {num_layers: 1, hidden_size: 32, num_attention_heads: 2}
data: {data_path: [text/tokens], seq_length: 64, split: [0.9, 0.1]}
training: {dtype: fp32}
"""


def resolve(folder: Path, stored: TrainingConfig, step: int = 10, **now: object) -> Schedule:
    """Resolve the options ``now`` for a resume of a checkpoint that has ``stored``."""
    write(folder, step, Config(training=stored))
    checkpoint = store.newest(folder)
    return resolve_schedule(TrainingConfig(**now), checkpoint, SingleProcessConsensus())


@pytest.mark.parametrize("train_iters", [400, 15, 11])
def test_auto_keeps_the_checkpoints_warm_up_in_longer_and_shorter_runs(train_iters, tmp_path):
    stored = TrainingConfig(train_iters=200, lr_warmup_iters=20)
    assert resolve(tmp_path, stored, train_iters=train_iters).warmup.iters == 20


def test_a_number_replaces_the_checkpoints_warm_up(tmp_path):
    stored = TrainingConfig(train_iters=200, lr_warmup_iters=20)
    assert resolve(tmp_path, stored, train_iters=400, lr_warmup_iters=3).warmup.iters == 3


def test_a_checkpoint_without_steps_has_no_warm_up_to_keep(tmp_path):
    """Such as an imported one, or the weights that --finetune starts from."""
    stored = TrainingConfig(train_iters=200, lr_warmup_iters=20)
    assert resolve(tmp_path, stored, step=0, train_iters=50).warmup.iters == 5
    write(tmp_path, 10, Config(training=stored))
    finetuned = store.newest(tmp_path).for_new_run()
    config = TrainingConfig(train_iters=50)
    assert resolve_schedule(config, finetuned, SingleProcessConsensus()).warmup.iters == 5
    assert resolve_schedule(config, None, SingleProcessConsensus()).warmup.iters == 5


def test_a_decay_that_would_end_within_the_kept_warm_up_is_refused_with_the_flags(tmp_path):
    stored = TrainingConfig(train_iters=200, lr_warmup_iters=20)
    with pytest.raises(ConfigError) as raised:
        resolve(tmp_path, stored, train_iters=200, lr_decay_iters=15)
    [problem] = raised.value.problems
    assert "lr_warmup_iters 20" in problem
    assert "lr_decay_iters 15" in problem
    assert "--lr-warmup-iters to at most 14" in problem
    explicit = resolve(tmp_path, stored, train_iters=200, lr_decay_iters=15, lr_warmup_iters=2)
    assert explicit.warmup.iters == 2


# The options of a checkpoint, those of the run that resumes from it, and the rate at its end.
MIN_LR_OF_RESUMES = [
    ({"lr": 5e-4, "min_lr": 1e-4}, {"lr": 5e-4}, 1e-4),
    ({"lr": 5e-4, "min_lr": 1e-4}, {"lr": 5e-4, "min_lr": 2e-5}, 2e-5),
    ({"lr": 5e-4, "min_lr": 1e-4}, {"lr": 5e-5}, 5e-6),
]


@pytest.mark.parametrize(("stored", "now", "min_lr"), MIN_LR_OF_RESUMES)
def test_auto_keeps_the_checkpoints_min_lr_while_lr_is_the_same(stored, now, min_lr, tmp_path):
    stored = TrainingConfig(train_iters=200, lr_warmup_iters=20, **stored)
    schedule = resolve(tmp_path, stored, train_iters=300, **now)
    config = schedule.applied_to(TrainingConfig(train_iters=300, **now))
    assert config.min_lr == schedule.min_lr.value == pytest.approx(min_lr)
    assert learning_rate(300, config) == pytest.approx(min_lr)
    assert config.problems() == []


def run(folder: Path, *flags: str) -> str:
    """Return the output of one process; it must succeed."""
    command = [str(PROGRAM), "--config", "small.yaml", *flags]
    process = Forked(command, folder, os.environ, subprocess.STDOUT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output


def rates(folder: Path, file: str) -> dict[int, float]:
    """Return the learning rate of each step in a metrics file."""
    records = map(json.loads, (folder / file).read_text().splitlines())
    return {record["step"]: record["lr"] for record in records if "lr" in record}


def test_ten_steps_train_with_every_default_and_more_steps_keep_the_warm_up(tmp_path):
    folder = working_folder(tmp_path, SMALL)
    low = ("--lr", "5e-5")  # below what min_lr is with the default lr
    short = ("--train-iters", "10", "--save", "saved", "--metrics-file", "short.jsonl")
    output = run(folder, *low, *short)
    assert "warm-up          1 step: auto" in output
    assert "min_lr           5e-06: auto: a tenth of --lr 5e-05, at most 0.0001" in output
    assert rates(folder, "short.jsonl")[1] == 5e-5
    stored = load_yaml(folder / "saved/step-00000010/config.yaml").training
    assert (stored.lr_warmup_iters, stored.min_lr) == (1, pytest.approx(5e-6))

    resume = (*low, "--load", "saved", "--save", "longer", "--train-iters", "14")
    output = run(folder, *resume, "--metrics-file", "long.jsonl")
    assert "warm-up          1 step: auto: as in the checkpoint" in output
    assert load_yaml(folder / "longer/step-00000014/config.yaml").training.lr_warmup_iters == 1

    # The rates are those of the same schedule without an interruption.
    whole = (*low, "--train-iters", "14", "--lr-warmup-iters", "1")
    run(folder, *whole, "--metrics-file", "whole.jsonl")
    expected = rates(folder, "whole.jsonl")
    resumed = rates(folder, "long.jsonl")
    assert resumed == {step: expected[step] for step in range(11, 15)}


def test_a_checkpoint_of_the_earlier_default_keeps_20_steps(tmp_path):
    folder = working_folder(tmp_path, SMALL)
    run(folder, "--train-iters", "21", "--lr-warmup-iters", "20", "--save", "saved")
    resume = ("--load", "saved", "--train-iters", "24")
    output = run(folder, *resume, "--metrics-file", "long.jsonl")
    assert "warm-up          20 steps: auto: as in the checkpoint" in output
    schedule = TrainingConfig(train_iters=24, lr_warmup_iters=20)
    expected = {step: learning_rate(step, schedule) for step in (22, 23, 24)}
    assert rates(folder, "long.jsonl") == expected
