"""The command line of inspect_checkpoint.py: reports on one or two checkpoints, exit codes."""

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_ring.config import Config, ModelConfig, TrainingConfig
from megatron_ring.errors import CheckpointError
from tests.checkpoint import imagined
from tools.inspect_checkpoint import main

MADE = {"commit": "0ca56ca", "written_at": "2026-11-22 17:56:19", "processes": "pipe 1, data 2"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write two checkpoints of a run, with moments."""
    config = Config(model=ModelConfig(num_layers=1), training=TrainingConfig(lr=0.25))
    for step in (5, 10):
        moments = {"exp_avg": imagined.weights(1), "exp_avg_sq": imagined.weights(2)}
        imagined.write(
            tmp_path / "run", step, {"weight": imagined.weights()} | moments, config, **MADE
        )
    return tmp_path / "run"


def table(output: str) -> dict[str, list[str]]:
    """Return the rows after the line of titles: the other columns by the name."""
    lines = output.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("name "))
    return {line.split()[0]: line.split()[1:] for line in lines[first + 1 :]}


def test_a_save_folder_shows_the_checkpoint_that_latest_names(folder, capsys):
    assert main([str(folder)]) == 0
    output, errors = capsys.readouterr()
    assert errors == f"{folder}: the latest is step-00000010.\n"
    assert output.startswith(f"{folder}/step-00000010: 9 files, ")
    for part in (
        "\nstep 10: 40 samples, 640 tokens seen, 10 optimizer steps\n",
        "\nmodel: 43 parameters, 1 layer, hidden size 256, 4 query and 4 key-value heads of 64",
        "parameter: weight, exp_avg, exp_avg_sq\n",
        "2026-11-22 17:56:19 (UTC), by commit 0ca56ca, processes pipe 1, data 2\n",
        ":\n  model.num_layers: 1\n  training.lr: 0.25\nfiles:\n  config.yaml: ",
    ):
        assert part in output
    row = table(output)["embedding.weight"]
    assert row[:3] == ["7x4", "float32", f"{norm('embedding.weight'):.6g}"]


def test_foreign_files_are_listed(folder, capsys):
    (folder / "step-00000010" / "notes.txt").write_text("the best so far")
    assert main([str(folder), "--verify"]) == 0
    output = capsys.readouterr().out
    assert f"{folder}/step-00000010: 9 files, " in output
    assert "not part of it: notes.txt\n" in output
    main([str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["other_files"] == ["notes.txt"]


def norm(name: str, seed: int = 0) -> float:
    return torch.linalg.vector_norm(imagined.weights(seed)[name].double()).item()


def test_all_files_are_listed_with_their_sizes(folder, capsys):
    files = {path.name: path.stat().st_size for path in (folder / "step-00000010").iterdir()}
    parts = [size for name, size in files.items() if name.startswith("part-")]
    main([str(folder)])
    output = capsys.readouterr().out
    assert f": 9 files, {sum(files.values()):,} bytes\n" in output
    assert f"\n  state.json: {files['state.json']:,} bytes\n" in output
    assert f"\n  part-*.safetensors: 6 files, {sum(parts):,} bytes\n" in output
    main([str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["files"] == files


def test_moments_are_shown_for_the_parameters_that_match_the_pattern(folder, capsys):
    arguments = ["--kind", "exp_avg_sq", "--tensors", "*s.0*", "--json"]
    assert main([str(folder / "step-00000005"), *arguments]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    document = json.loads(output)
    assert document["step"] == 5
    assert document["kind"] == "exp_avg_sq"
    assert document["parameters"] == 43
    assert document["consumed_tokens"] == 320
    assert document["not_default"] == ["model.num_layers", "training.lr"]
    assert document["config"]["training.lr"] == 0.25
    [row] = document["tensors"]
    assert row["name"] == "blocks.0.mlp.down_proj.weight"
    assert row["shape"] == [2, 5]
    assert row["type"] == "float32"
    assert math.isclose(row["norm"], norm("blocks.0.mlp.down_proj.weight", seed=2), rel_tol=1e-12)


def test_unknown_provenance_is_shown_as_unknown(other, capsys):
    main([str(other)])
    output = capsys.readouterr().out
    assert "at unknown (UTC), by commit unknown, processes unknown\n" in output


def test_equal_checkpoints_have_exit_code_0(folder, capsys):
    assert main([str(folder / "step-00000005"), str(folder)]) == 0
    output = capsys.readouterr().out
    assert (
        f"first: {folder}/step-00000005, step 5\nsecond: {folder}/step-00000010, step 10\n"
    ) in output
    assert "options that differ: none\n" in output
    assert output.endswith("\nequal\n")


@pytest.fixture
def other(tmp_path) -> Path:
    """Write a checkpoint without moments that differs from those of ``folder``.

    One tensor has another value, one another name, one another shape; the learning rate differs.
    """
    whole = imagined.weights()
    whole["blocks.1.mlp.down_proj.weight"] = whole.pop("blocks.0.mlp.down_proj.weight")
    whole["embedding.weight"][0, 0] += 1
    whole["norm.weight"] = torch.ones(4)
    config = Config(model=ModelConfig(num_layers=1), training=TrainingConfig(lr=0.5))
    return imagined.write(tmp_path / "other", 10, {"weight": whole}, config)


def test_different_checkpoints_have_exit_code_1_and_a_list_of_differences(folder, other, capsys):
    assert main([str(folder), str(other)]) == 1
    output = capsys.readouterr().out
    assert (
        ":\n  training.lr: 0.25 and 0.5\n"
        "only in the first: blocks.0.mlp.down_proj.weight\n"
        "only in the second: blocks.1.mlp.down_proj.weight\n"
        "two shapes: norm.weight 5 and 4\n"
    ) in output
    relative = f"{1 / norm('embedding.weight'):.6g}"
    assert table(output)["embedding.weight"] == ["float32", "no", relative, "1", "0"]
    assert output.splitlines()[-1].startswith("different: the values of 1 of 1 ")


def test_differences_are_printed_as_json(folder, other, capsys):
    assert main([str(folder), str(other), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["only_first"] == ["blocks.0.mlp.down_proj.weight"]
    assert document["only_second"] == ["blocks.1.mlp.down_proj.weight"]
    assert document["two_shapes"] == ["norm.weight"]
    assert document["config"] == {"training.lr": [0.25, 0.5]}
    assert document["equal"] is False
    [row] = document["tensors"]
    assert (row["name"], row["equal"]) == ("embedding.weight", False)


def test_a_difference_in_names_only_has_exit_code_1(folder, other):
    assert main([str(folder), str(other), "--tensors", "blocks.*"]) == 1


def test_verify_checks_every_byte(folder, capsys):
    assert main([str(folder), "--verify", "--tensors", "norm*"]) == 0
    assert f"{folder}/step-00000010: verified" in capsys.readouterr().err
    part = folder / "step-00000010" / "part-00003.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert main([str(folder)]) == 0
    message = failure(capsys, str(folder), "--verify")
    assert "step-00000010" in message
    assert "part-00003.safetensors has other bytes" in message


def failure(capsys, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exited:
        main([*arguments])
    assert exited.value.code == CheckpointError.exit_code
    return capsys.readouterr().err


def test_missing_kinds_names_and_checkpoints_are_errors(folder, other, capsys):
    message = failure(capsys, str(other), "--kind", "exp_avg")
    for part in ("no exp_avg", "weight", "--kind"):
        assert part in message
    assert "no exp_avg" in failure(capsys, str(folder), str(other), "--kind", "exp_avg")
    for checkpoints in ([str(folder)], [str(folder), str(other)]):
        message = failure(capsys, *checkpoints, "--tensors", "head*")
        for part in ("'head*'", " 3,", "blocks.0.mlp.down_proj.weight", "norm.weight", "--tensors"):
            assert part in message
    assert f"{folder}x is not a checkpoint" in failure(capsys, f"{folder}x")
