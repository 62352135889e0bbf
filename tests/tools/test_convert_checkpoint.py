"""The command line of convert_checkpoint.py: output, written files and exit codes."""

import json
from pathlib import Path

import pytest

from megatron_ring.config import load_yaml
from megatron_ring.errors import CheckpointError, ConfigError
from tests.checkpoint.hugging_face_models import CASES, save
from tools.convert_checkpoint import main


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> Path:
    return save(CASES["qwen2"], tmp_path_factory.mktemp("models") / "qwen2")


def test_an_import_and_an_export_report_what_they_have_written(qwen2, tmp_path, capsys):
    main(["import", str(qwen2), str(tmp_path / "ours")])
    output = capsys.readouterr().out
    assert "step-00000000: qwen2, 35,168 parameters in float32" in output
    assert "vocab_size 61, seq_length 48, RoPE base 10000" in output
    assert "hugging_face/: generation_config.json" in output
    assert f"--config {tmp_path}/ours/step-00000000/config.yaml --load {tmp_path}/ours" in output

    main(
        [
            "export",
            str(tmp_path / "ours"),
            str(tmp_path / "back"),
            "--dtype",
            "bf16",
            "--max-shard-size",
            "30KB",
        ]
    )
    output = capsys.readouterr().out
    assert "ours: the latest is step-00000000" in output
    assert "step-00000000 as qwen2 in bfloat16, 5 files" in output
    assert "48 tokens" in output
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"


def test_an_import_sets_the_sequence_length_and_rope_scaling(qwen2, tmp_path, capsys):
    main(
        [
            "import",
            str(qwen2),
            str(tmp_path / "ours"),
            "--rope-scaling",
            "yarn",
            "--seq-length",
            "192",
        ]
    )
    assert "seq_length 192, RoPE base 10000, yarn x 4" in capsys.readouterr().out
    written = load_yaml(tmp_path / "ours/step-00000000/config.yaml")
    assert written.data.seq_length == 192
    assert written.model.rope_scaling == "yarn"
    assert written.model.padded_vocab_size == 61


def test_missing_and_ignored_parts_are_reported(tmp_path, capsys):
    source = save(CASES["gpt2"], tmp_path / "gpt2")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.1}))
    (source / "generation_config.json").unlink()
    main(["import", str(source), str(tmp_path / "ours")])
    output = capsys.readouterr().out
    assert "not imported: resid_pdrop 0.1" in output
    assert "learned positions" in output
    assert "no tokenizer" in output
    main(["export", str(tmp_path / "ours"), str(tmp_path / "back")])
    assert (tmp_path / "back/generation_config.json").is_file()
    output = capsys.readouterr().out
    assert "json: generation_config.json only; the checkpoint has no tokenizer" in output
    assert "--tokenizer" in output


def test_an_export_without_a_tokenizer_and_an_end_reports_none(tmp_path, capsys):
    source = save(CASES["gpt2"], tmp_path / "gpt2")
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    main(["import", str(source), str(tmp_path / "ours")])
    main(["export", str(tmp_path / "ours"), str(tmp_path / "back")])
    assert not (tmp_path / "back/generation_config.json").exists()
    assert "json: none; the checkpoint has no tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["import", "nowhere", "ours"], CheckpointError, "nowhere is not a folder"),
        (["import", "{qwen2}", "ours", "--seq-length", "4096"], ConfigError, "--rope-scaling"),
        (["export", "nowhere", "theirs"], CheckpointError, "nowhere is not a checkpoint"),
        (
            ["export", "nowhere", "theirs", "--max-shard-size", "5XB"],
            ConfigError,
            "max_shard_size '5XB'",
        ),
    ],
)
def test_errors_have_their_exit_code(
    arguments, error, message, qwen2, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        main([argument.format(qwen2=qwen2) for argument in arguments])
    assert exited.value.code == error.exit_code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
