"""The command line of prepare_data.py: from arguments to files, summary and exit code."""

from pathlib import Path

import pytest

from megatron_ring.data.prepare import DEFAULT_VOCAB_SIZE
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import ConfigError, DataError
from tools.prepare_data import main

TEXT = "Sing, O goddess, the anger of Achilles son of Peleus, that brought countless ills upon the Achaeans.\n"


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text").mkdir()
    for name in ("a", "b"):
        (tmp_path / "text" / f"{name}.txt").write_text(TEXT)
    return tmp_path / "text"


def test_a_folder_becomes_a_store_and_a_summary(text, tmp_path, capsys):
    prefix = tmp_path / "store" / "P"
    assert main(["--input", str(text), "--output-prefix", str(prefix), "--vocab-size", "320"]) == 0
    tokens = TokenStore(prefix).lengths.sum()
    assert f"2 documents, {tokens} tokens, {2 * len(TEXT) / tokens:.2f} bytes per token" in capsys.readouterr().out


def test_a_tokenizer_that_exists_is_used_and_copied(text, tmp_path):
    first, second = tmp_path / "first" / "P", tmp_path / "second" / "P"
    assert main(["--input", str(text), "--output-prefix", str(first), "--vocab-size", "320"]) == 0
    model = first.parent / "tokenizer.model"
    assert main(["--input", str(text), "--output-prefix", str(second), "--tokenizer-model", str(model)]) == 0
    assert (second.parent / "tokenizer.model").read_bytes() == model.read_bytes()


def test_an_error_is_one_message_and_its_exit_code(tmp_path, capsys):
    arguments = ["--input", str(tmp_path / "none"), "--output-prefix", str(tmp_path / "P")]
    assert main(arguments) == DataError.exit_code
    assert capsys.readouterr().err == f"input {tmp_path / 'none'} does not exist. Set --input.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one source of text is needed, no more. Set --input or --python-library."),
        (["--input", "a", "--python-library"], "one source of text is needed, no more"),
        (["--input", "a", "--vocab-size", "9", "--tokenizer-model", "m"], "Drop --vocab-size or --tokenizer-model."),
        (["--input", "a", "--vocab-size", "-9"], "vocab_size -9 must be above 0. Set --vocab-size."),
        (["--input", "a", "--workers", "0"], "workers 0 must be at least 1. Set --workers."),
    ],
)
def test_options_that_cannot_be_met_are_refused(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--output-prefix", str(tmp_path / "P")]) == ConfigError.exit_code
    assert message in capsys.readouterr().err


def test_help_names_the_default_vocabulary(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"0: {DEFAULT_VOCAB_SIZE}." in capsys.readouterr().out
