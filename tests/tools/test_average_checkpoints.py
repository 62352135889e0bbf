"""The command line of average_checkpoints.py: selection of checkpoints, weights, errors."""

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
    """Return whether ``out`` has the mean of the checkpoints of these steps."""
    written = Summary.of(out / f"step-{max(weights):08d}").tensors
    for name in imagined.weights():
        terms = [weight * imagined.weights(step)[name].double() for step, weight in weights.items()]
        mean = sum(terms) / sum(weights.values())
        if not torch.equal(written.read(name), mean.float()):
            return False
    return True


def test_checkpoints_and_save_folders_are_averaged(folder, tmp_path, capsys):
    main([str(tmp_path / "out"), str(folder / "step-00000005"), str(folder)])
    assert averaged(tmp_path / "out", {5: 1, 20: 1})
    output = capsys.readouterr().out
    assert f"{tmp_path}/out/step-00000020" in output
    assert f"1 x {folder}/step-00000005, 1 x {folder}/step-00000020" in output


def test_the_weights_of_the_last_checkpoints_are_from_the_oldest_to_the_newest(folder, tmp_path):
    main([str(tmp_path / "out"), str(folder), "--last", "3", "--weights", "1", "2", "1.5"])
    assert averaged(tmp_path / "out", {10: 1, 15: 2, 20: 1.5})


def test_the_last_checkpoints_are_those_up_to_latest(folder, tmp_path):
    """Later steps are of an earlier run."""
    (folder / "latest").write_text("step-00000015\n")
    main([str(tmp_path / "out"), str(folder), "--last", "2"])
    assert averaged(tmp_path / "out", {10: 1, 15: 1})


def failure(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exited:
        main([*arguments])
    return exited.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["A"], ("at least 2", "not 1", "--last")),
        (["A", "--last", "1"], ("at least 2", "not 1", "--last")),
        (["A", "--last", "-2"], ("at least 2", "not -2", "--last")),
        (["A", "B", "--last", "2"], ("last 2", "one folder", "2 are given", "--last")),
        (["A", "B", "--weights", "1"], ("1 weight for", "2 checkpoints", "--weights")),
        (
            ["A", "--last", "3", "--weights", "1", "1"],
            ("2 weights", "3 checkpoints", "--weights"),
        ),
        (["A", "B", "--weights", "1", "0"], ("weight 0 ", "above 0", "--weights")),
        (["A", "B", "--weights", "nan", "inf"], ("weight inf ", "finite", "--weights")),
    ],
)
def test_invalid_options_are_refused_with_numbers_and_flags(arguments, parts, tmp_path, capsys):
    code, message = failure(capsys, str(tmp_path / "out"), *arguments)
    assert code == ConfigError.exit_code
    for part in parts:
        assert part in message


def test_more_checkpoints_than_exist_are_refused_with_their_number(folder, tmp_path, capsys):
    code, message = failure(capsys, str(tmp_path / "out"), str(folder), "--last", "5")
    assert code == CheckpointError.exit_code
    for part in (f"{folder} has 4 checkpoints", "not 5", "--last"):
        assert part in message


def test_a_damaged_checkpoint_is_refused_before_anything_is_written(folder, tmp_path, capsys):
    part = folder / "step-00000015" / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    code, message = failure(capsys, str(tmp_path / "out"), str(folder), "--last", "2")
    assert code == CheckpointError.exit_code
    assert "step-00000015" in message
    assert "part-00001.safetensors has other bytes" in message
    assert not (tmp_path / "out").exists()
