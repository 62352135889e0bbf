"""The lines that a run prints about its checkpoint before its first step."""

from pathlib import Path

import pytest

from megatron_ring.checkpoint import store
from megatron_ring.config import CheckpointConfig, Config, TrainingConfig
from megatron_ring.training import console
from tests.checkpoint.small import write


def lines(folder: Path, load: Path, save: Path, train_iters: int = 20) -> str:
    checkpoint = CheckpointConfig(load=str(load), save=str(save))
    config = Config(checkpoint=checkpoint, training=TrainingConfig(train_iters=train_iters))
    return "\n".join(console._resume_lines(store.newest(folder), config, []))


@pytest.mark.parametrize(
    ("load", "save", "is_warned"),
    [
        ("a/step-00000010", "a", True),
        ("a/step-00000010", "b", False),
        ("a", "a", False),
        ("a", "b", False),
    ],
)
def test_a_load_that_would_return_to_the_same_checkpoint_gets_a_warning(
    tmp_path, load, save, is_warned
):
    write(tmp_path / "a", 10)
    printed = lines(tmp_path / "a", tmp_path / load, tmp_path / save)
    assert (f"--load {tmp_path / 'a'} continues from the newest" in printed) == is_warned


def test_a_finished_run_names_the_flag_to_continue(tmp_path):
    write(tmp_path, 10)
    assert "--train-iters is 10" in lines(tmp_path, tmp_path, tmp_path, train_iters=10)
    assert "--train-iters" not in lines(tmp_path, tmp_path, tmp_path, train_iters=11)


def test_earlier_checkpoints_in_save_are_found_for_a_run_from_step_0(tmp_path):
    write(tmp_path, 10)
    config = Config(checkpoint=CheckpointConfig(save=str(tmp_path)))
    assert console._earlier_checkpoints(config) == [tmp_path / "step-00000010"]
    assert console._earlier_checkpoints(Config()) == []
