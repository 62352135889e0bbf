"""The command line of consolidate_checkpoint.py: the file, as safetensors reads it, and errors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_ring.config import Config, ModelConfig
from megatron_ring.errors import CheckpointError, ConfigError
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
    output = capsys.readouterr().out
    assert output.startswith(f"{file}: {file.stat().st_size:,} bytes, the ")
    assert f"of every parameter of {folder}/step-00000005.\n" in output


def test_the_metadata_of_the_file_is_enough_to_build_the_model(tmp_path):
    """The file is of a mean, and is read without any code for checkpoints."""
    config = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, add_qkv_bias=True)
    models = [
        GPT(config, vocab_size=7, seq_length=16, attention=None, seed=seed) for seed in (1, 2)
    ]
    for step, model in enumerate(models):
        imagined.write(tmp_path / "run", step, {"weight": model.state_dict()}, Config(model=config))
    average([str(tmp_path / "mean"), str(tmp_path / "run"), "--last", "2"])
    main([str(tmp_path / "mean"), str(tmp_path / "mean.safetensors")])
    with safe_open(tmp_path / "mean.safetensors", framework="pt") as file:
        metadata = file.metadata()
    sizes = {name: int(metadata[name]) for name in ("vocab_size", "seq_length")}
    mean = GPT(ModelConfig(**json.loads(metadata["model"])), **sizes, attention=None)
    mean.load_state_dict(load_file(tmp_path / "mean.safetensors"), strict=True)
    for found, first, second in zip(
        *(model.parameters() for model in (mean, *models)), strict=True
    ):
        torch.testing.assert_close(found, (first + second) / 2)


def failure(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exited:
        main([*arguments])
    return exited.value.code, capsys.readouterr().err


def test_an_existing_file_and_another_suffix_are_refused(folder, tmp_path, capsys):
    file = tmp_path / "model.bin"
    file.write_bytes(b"mine")
    code, message = failure(capsys, str(folder), str(file))
    assert code == ConfigError.exit_code
    assert f"file {file} must end in .safetensors" in message
    assert f"Nearest: {tmp_path}/model.safetensors." in message
    assert f"file {file} already exists" in message
    assert file.read_bytes() == b"mine"


def test_a_damaged_checkpoint_is_refused_and_no_file_is_left(folder, tmp_path, capsys):
    part = folder / "step-00000005" / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    code, message = failure(capsys, str(folder), str(tmp_path / "model.safetensors"))
    assert code == CheckpointError.exit_code
    assert "step-00000005" in message
    assert "part-00001.safetensors has other bytes" in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_error_for_a_folder_that_cannot_be_written_has_the_reason(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    for parent, reason in (("nowhere", "No such file or directory"), ("file", "Not a directory")):
        code, message = failure(capsys, str(folder), str(tmp_path / parent / "model.safetensors"))
        assert code == CheckpointError.exit_code
        for part in ("model.safetensors", reason, "FILE"):
            assert part in message
