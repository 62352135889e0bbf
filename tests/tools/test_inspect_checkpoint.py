"""The command line of inspect_checkpoint.py: what is told of one checkpoint and of two, exit codes, and errors."""

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
    """Two checkpoints of a run, with moments."""
    config = Config(model=ModelConfig(num_layers=1), training=TrainingConfig(lr=0.25))
    for step in (5, 10):
        moments = {"exp_avg": imagined.weights(1), "exp_avg_sq": imagined.weights(2)}
        imagined.write(
            tmp_path / "run", step, {"weight": imagined.weights()} | moments, config, **MADE
        )
    return tmp_path / "run"


def table(shown: str) -> dict[str, list[str]]:
    """The rows after the line of titles: name, and what stands beside it."""
    lines = shown.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("name "))
    return {line.split()[0]: line.split()[1:] for line in lines[first + 1 :]}


def test_the_checkpoint_that_latest_names_is_told(folder, capsys):
    assert main([str(folder)]) == 0
    shown, said = capsys.readouterr()
    assert said == f"{folder}: the latest is step-00000010.\n"
    assert shown.startswith(f"{folder}/step-00000010: 9 files, ")
    assert "\nstep 10: 40 samples, 640 tokens seen, 10 optimizer steps\n" in shown
    assert (
        "\nmodel: 43 parameters, 1 layers, hidden size 256, 4 query and 4 key-value heads of 64"
        in shown
    )
    assert "\nkept of each parameter: weight, exp_avg, exp_avg_sq\n" in shown
    assert (
        "\nmade at 2026-11-22 17:56:19 (UTC), by commit 0ca56ca, processes pipe 1, data 2\n"
        in shown
    )
    assert "default:\n  model.num_layers: 1\n  training.lr: 0.25\nfiles:\n  config.yaml: " in shown
    assert table(shown)["embedding.weight"][:3] == [
        "7x4",
        "float32",
        f"{norm('embedding.weight'):.6g}",
    ]


def test_files_that_are_no_part_of_it_are_named(folder, capsys):
    (folder / "step-00000010" / "notes.txt").write_text("the best so far")
    assert main([str(folder), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert f"{folder}/step-00000010: 9 files, " in shown
    assert "no part of it: notes.txt\n" in shown
    main([str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["other_files"] == ["notes.txt"]


def norm(name: str, seed: int = 0) -> float:
    return torch.linalg.vector_norm(imagined.weights(seed)[name].double()).item()


def test_all_files_are_counted_with_all_their_bytes(folder, capsys):
    files = {path.name: path.stat().st_size for path in (folder / "step-00000010").iterdir()}
    parts = [size for name, size in files.items() if name.startswith("part-")]
    main([str(folder)])
    shown = capsys.readouterr().out
    assert f": 9 files, {sum(files.values()):,} bytes\n" in shown
    assert f"\n  state.json: {files['state.json']:,} bytes\n" in shown
    assert f"\n  part-*.safetensors: 6 files, {sum(parts):,} bytes\n" in shown
    main([str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["files"] == files


def test_moments_are_told_of_the_parameters_whose_names_fit(folder, capsys):
    assert (
        main(
            [str(folder / "step-00000005"), "--kind", "exp_avg_sq", "--tensors", "*s.0*", "--json"]
        )
        == 0
    )
    shown, said = capsys.readouterr()
    assert said == ""
    told = json.loads(shown)
    assert (told["step"], told["kind"], told["parameters"], told["consumed_tokens"]) == (
        5,
        "exp_avg_sq",
        43,
        320,
    )
    assert (told["not_default"], told["config"]["training.lr"]) == (
        ["model.num_layers", "training.lr"],
        0.25,
    )
    [row] = told["tensors"]
    assert (row["name"], row["shape"], row["type"]) == (
        "blocks.0.mlp.down_proj.weight",
        [2, 5],
        "float32",
    )
    assert math.isclose(row["norm"], norm("blocks.0.mlp.down_proj.weight", seed=2), rel_tol=1e-12)


def test_what_is_not_known_of_how_it_was_made_is_said_to_be_so(other, capsys):
    main([str(other)])
    assert (
        "\nmade at unknown (UTC), by commit unknown, processes unknown\n" in capsys.readouterr().out
    )


def test_equal_checkpoints_leave_with_0(folder, capsys):
    assert main([str(folder / "step-00000005"), str(folder)]) == 0
    shown = capsys.readouterr().out
    assert (
        f"first: {folder}/step-00000005, step 5\nsecond: {folder}/step-00000010, step 10\n" in shown
    )
    assert "config, where they differ: nowhere\n" in shown
    assert shown.endswith("\nequal\n")


@pytest.fixture
def other(tmp_path) -> Path:
    """One tensor with another value, one renamed, one of another shape, another learning rate, and no moments."""
    whole = imagined.weights()
    whole["blocks.1.mlp.down_proj.weight"] = whole.pop("blocks.0.mlp.down_proj.weight")
    whole["embedding.weight"][0, 0] += 1
    whole["norm.weight"] = torch.ones(4)
    config = Config(model=ModelConfig(num_layers=1), training=TrainingConfig(lr=0.5))
    return imagined.write(tmp_path / "other", 10, {"weight": whole}, config)


def test_different_checkpoints_leave_with_1_and_what_differs(folder, other, capsys):
    assert main([str(folder), str(other)]) == 1
    shown = capsys.readouterr().out
    assert (
        "where they differ:\n  training.lr: 0.25 and 0.5\nonly in the first: blocks.0.mlp.down_proj.weight\n"
        in shown
    )
    assert (
        "only in the second: blocks.1.mlp.down_proj.weight\ntwo shapes: norm.weight 5 and 4\n"
        in shown
    )
    assert table(shown)["embedding.weight"] == [
        "float32",
        "no",
        f"{1 / norm('embedding.weight'):.6g}",
        "1",
        "0",
    ]
    assert shown.endswith("\ndifferent: the values of 1 of 1 tensors in both\n")


def test_what_differs_is_told_to_machines_too(folder, other, capsys):
    assert main([str(folder), str(other), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    names = (told["only_first"], told["only_second"], told["two_shapes"])
    assert names == (
        ["blocks.0.mlp.down_proj.weight"],
        ["blocks.1.mlp.down_proj.weight"],
        ["norm.weight"],
    )
    assert (told["config"], told["equal"]) == ({"training.lr": [0.25, 0.5]}, False)
    assert [(row["name"], row["equal"]) for row in told["tensors"]] == [("embedding.weight", False)]


def test_a_difference_in_names_alone_leaves_with_1(folder, other):
    assert main([str(folder), str(other), "--tensors", "blocks.*"]) == 1


def test_every_byte_is_verified_when_asked(folder, capsys):
    assert main([str(folder), "--verify", "--tensors", "norm*"]) == 0
    assert (
        f"{folder}/step-00000010: verified, every byte is as it was written.\n"
        in capsys.readouterr().err
    )
    part = folder / "step-00000010" / "part-00003.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert main([str(folder)]) == 0
    assert "step-00000010 is not whole: part-00003.safetensors has other bytes" in failure(
        capsys, str(folder), "--verify"
    )


def failure(capsys, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([*arguments])
    assert left.value.code == CheckpointError.exit_code
    return capsys.readouterr().err


def test_what_is_not_there_is_named(folder, other, capsys):
    assert "keeps no exp_avg of its parameters, but weight. Set --kind" in failure(
        capsys, str(other), "--kind", "exp_avg"
    )
    assert "no exp_avg" in failure(capsys, str(folder), str(other), "--kind", "exp_avg")
    said = "has a name like 'head*'. There are 3, from blocks.0.mlp.down_proj.weight to norm.weight. Set --tensors."
    assert said in failure(capsys, str(folder), "--tensors", "head*")
    assert said in failure(capsys, str(folder), str(other), "--tensors", "head*")
    assert "is no checkpoint" in failure(capsys, str(folder) + "x")
