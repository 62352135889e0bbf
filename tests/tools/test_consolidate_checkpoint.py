"""The command line of consolidate_checkpoint.py: the file as safetensors reads it, and errors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_ring.config import Config, ModelConfig
from megatron_ring.errors import CheckpointError, ConfigError
from megatron_ring.model import initialization
from megatron_ring.model.gpt import GPT
from tests.checkpoint import imagined
from tools.average_checkpoints import main as average
from tools.consolidate_checkpoint import main


@pytest.fixture
def folder(tmp_path) -> Path:
    imagined.write(
        tmp_path / "run", 5, {"weight": imagined.weights(), "exp_avg": imagined.weights(1)}
    )
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("arguments", "seed", "dtype"),
    [
        ([], 0, torch.float32),
        (["--dtype", "bf16"], 0, torch.bfloat16),
        (["--dtype", "fp16", "--kind", "exp_avg"], 1, torch.float16),
    ],
)
def test_a_file_of_whole_tensors_is_written(folder, tmp_path, arguments, seed, dtype, capsys):
    file = tmp_path / "model.safetensors"
    main([str(folder), str(file), *arguments])
    found = load_file(file)
    assert {name: values.dtype for name, values in found.items()} == dict.fromkeys(
        imagined.weights(), dtype
    )
    assert all(
        torch.equal(found[name], values.to(dtype))
        for name, values in imagined.weights(seed).items()
    )
    shown = capsys.readouterr().out
    assert shown.startswith(f"{file}: {file.stat().st_size:,} bytes, the ")
    assert f"of every parameter of {folder}/step-00000005.\n" in shown


def test_the_file_of_a_mean_is_a_gpt_of_the_options_in_its_metadata(tmp_path):
    """As a reader has it who knows our model and nothing of checkpoints."""
    config = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, add_qkv_bias=True)
    models = [
        initialization.build(GPT, config, vocab_size=7, seq_length=16, attention=None, seed=seed)
        for seed in (1, 2)
    ]
    for step, model in enumerate(models):
        imagined.write(tmp_path / "run", step, {"weight": model.state_dict()}, Config(model=config))
    average([str(tmp_path / "mean"), str(tmp_path / "run"), "--last", "2"])
    main([str(tmp_path / "mean"), str(tmp_path / "mean.safetensors")])
    with safe_open(tmp_path / "mean.safetensors", framework="pt") as file:
        about = file.metadata()
    sizes = {name: int(about[name]) for name in ("vocab_size", "seq_length")}
    mean = GPT(ModelConfig(**json.loads(about["model"])), **sizes, attention=None)
    mean.load_state_dict(load_file(tmp_path / "mean.safetensors"), strict=True)
    for found, first, second in zip(
        *(model.parameters() for model in (mean, *models)), strict=True
    ):
        torch.testing.assert_close(found, (first + second) / 2)


def failure(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main([*arguments])
    return left.value.code, capsys.readouterr().err


def test_a_file_that_is_there_and_one_of_another_suffix_are_refused(folder, tmp_path, capsys):
    file = tmp_path / "model.bin"
    file.write_bytes(b"mine")
    code, told = failure(capsys, str(folder), str(file))
    assert code == ConfigError.exit_code
    assert f"file {file} must end in .safetensors. Nearest: {tmp_path}/model.safetensors." in told
    assert f"file {file} is there already. Give FILE another name, or move it away." in told
    assert file.read_bytes() == b"mine"


def test_a_damaged_checkpoint_is_refused_and_no_file_is_left(folder, tmp_path, capsys):
    part = folder / "step-00000005" / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    code, told = failure(capsys, str(folder), str(tmp_path / "model.safetensors"))
    assert code == CheckpointError.exit_code
    assert "step-00000005 is not whole: part-00001.safetensors has other bytes" in told
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_is_not_there_or_none_is_named(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    for parent, reason in (("nowhere", "No such file or directory"), ("file", "Not a directory")):
        code, told = failure(capsys, str(folder), str(tmp_path / parent / "model.safetensors"))
        assert code == CheckpointError.exit_code
        assert f"model.safetensors cannot be written: {reason}. Give FILE another name." in told
