"""The command line of average_checkpoints.py: which checkpoints are averaged, with which weights, and errors."""

from pathlib import Path

import pytest
import torch

from megatron_ring.checkpoint.summary import Summary
from megatron_ring.errors import CheckpointError, ConfigError
from tests.checkpoint import imagined
from tools.average_checkpoints import main

STEPS = (5, 10, 15, 20)


@pytest.fixture
def folder(tmp_path) -> Path:
    for step in STEPS:
        imagined.write(tmp_path / "run", step, {"weight": imagined.weights(step)})
    return tmp_path / "run"


def averaged(out: Path, weights: dict[int, float]) -> bool:
    """Whether ``out`` has the mean of the checkpoints of these steps."""
    found = Summary.of(out / f"step-{max(weights):08d}").tensors
    means = {
        name: sum(
            weight * imagined.weights(step)[name].double() for step, weight in weights.items()
        )
        / sum(weights.values())
        for name in imagined.weights()
    }
    return all(torch.equal(found.read(name), mean.float()) for name, mean in means.items())


def test_checkpoints_and_folders_of_them_are_averaged(folder, tmp_path, capsys):
    main([str(tmp_path / "out"), str(folder / "step-00000005"), str(folder)])
    assert averaged(tmp_path / "out", {5: 1, 20: 1})
    assert capsys.readouterr().out == (
        f"{tmp_path}/out/step-00000020: the mean of 1 x {folder}/step-00000005, 1 x {folder}/step-00000020.\n"
    )


def test_the_last_of_a_folder_count_from_the_oldest(folder, tmp_path):
    main([str(tmp_path / "out"), str(folder), "--last", "3", "--weights", "1", "2", "1.5"])
    assert averaged(tmp_path / "out", {10: 1, 15: 2, 20: 1.5})


def test_the_last_are_those_up_to_latest(folder, tmp_path):
    """Steps beyond it are of an earlier run."""
    (folder / "latest").write_text("step-00000015\n")
    main([str(tmp_path / "out"), str(folder), "--last", "2"])
    assert averaged(tmp_path / "out", {10: 1, 15: 1})


def failure(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main([*arguments])
    return left.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["A"], "1 checkpoints have no mean: 2 or more are needed. Give more, or set --last."),
        (["A", "--last", "1"], "1 checkpoints have no mean"),
        (["A", "--last", "-2"], "-2 checkpoints have no mean"),
        (
            ["A", "B", "--last", "2"],
            "last 2 is of one folder, and 2 are given. Drop --last, or give one.",
        ),
        (["A", "B", "--weights", "1"], "1 weights are given for 2 checkpoints. Set --weights."),
        (
            ["A", "--last", "3", "--weights", "1", "1"],
            "2 weights are given for 3 checkpoints. Set --weights.",
        ),
        (["A", "B", "--weights", "1", "0"], "weight 0 must be above 0, and finite. Set --weights."),
        (
            ["A", "B", "--weights", "nan", "inf"],
            "weight inf must be above 0, and finite. Set --weights.",
        ),
    ],
)
def test_what_cannot_be_averaged_is_said(arguments, said, tmp_path, capsys):
    code, told = failure(capsys, str(tmp_path / "out"), *arguments)
    assert code == ConfigError.exit_code
    assert said in told


def test_more_than_there_are_is_refused_with_their_number(folder, tmp_path, capsys):
    code, told = failure(capsys, str(tmp_path / "out"), str(folder), "--last", "5")
    assert code == CheckpointError.exit_code
    assert f"{folder} has 4 checkpoints up to its latest, not 5. Set --last." in told


def test_a_damaged_checkpoint_is_refused_before_anything_is_written(folder, tmp_path, capsys):
    part = folder / "step-00000015" / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    code, told = failure(capsys, str(tmp_path / "out"), str(folder), "--last", "2")
    assert code == CheckpointError.exit_code
    assert "step-00000015 is not whole: part-00001.safetensors has other bytes" in told
    assert not (tmp_path / "out").exists()
