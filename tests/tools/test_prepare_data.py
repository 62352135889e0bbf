"""The command line of prepare_data.py: files, summary, errors and exit codes."""

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ring.data.manifest import read_manifest
from megatron_ring.data.prepare import DEFAULT_VOCAB_SIZE
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import ConfigError, DataError
from tools.prepare_data import main

TEXT = (
    "Sing, O goddess, the anger of Achilles son of Peleus, "
    "that brought countless ills upon the Achaeans.\n"
)


def prepare(input: Path | str, prefix: Path | str, *flags: str, vocab_size: int = 320) -> int:
    """Run the command line, training a small tokenizer, and return its exit code."""
    arguments = ["--input", str(input), "--output-prefix", str(prefix)]
    return main([*arguments, "--vocab-size", str(vocab_size), *flags])


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text").mkdir()
    for name in ("a", "b"):
        (tmp_path / "text" / f"{name}.txt").write_text(TEXT)
    return tmp_path / "text"


def test_a_folder_becomes_a_store_and_a_summary(text, tmp_path, capsys):
    prefix = tmp_path / "store" / "P"
    assert prepare(text, prefix) == 0
    tokens = TokenStore(prefix).lengths.sum()
    counts = f"2 documents, {tokens} tokens, {2 * len(TEXT) / tokens:.2f} bytes per token"
    assert counts in capsys.readouterr().out


def test_the_replacement_of_a_store_is_announced(text, tmp_path, capsys):
    prefix = tmp_path / "P"
    assert prepare(text, prefix) == 0
    assert "already a store" not in capsys.readouterr().err
    (text / "b.txt").unlink()
    assert (
        prepare(text, prefix, "--tokenizer-model", str(tmp_path / "tokenizer.model"), vocab_size=0)
        == 0
    )
    printed = capsys.readouterr()
    assert f"{prefix} is already a store of 2 documents" in printed.err
    assert "1 document, " in printed.out
    assert len(TokenStore(prefix)) == 1


def test_an_existing_tokenizer_is_used_and_copied(text, tmp_path):
    first = tmp_path / "first" / "P"
    second = tmp_path / "second" / "P"
    assert prepare(text, first) == 0
    model = first.parent / "tokenizer.model"
    arguments = ["--input", str(text), "--output-prefix", str(second)]
    assert main([*arguments, "--tokenizer-model", str(model)]) == 0
    assert (second.parent / "tokenizer.model").read_bytes() == model.read_bytes()


def test_standard_input_is_read_as_json_lines_and_its_copy_deleted(
    text, tmp_path, capsys, monkeypatch
):
    line = json.dumps({"text": TEXT}).encode()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(line)))
    arguments = ["--input", "-", str(text), "--output-prefix", str(tmp_path / "P")]
    assert main([*arguments, "--vocab-size", "320"]) == 0
    assert "3 documents" in capsys.readouterr().out
    assert not list(tmp_path.glob("P.work*"))


def test_skipped_documents_are_reported_by_line_and_counted(text, tmp_path, capsys):
    (text / "c.jsonl").write_text("rubbish\n")
    assert prepare(text, tmp_path / "P") == DataError.exit_code
    assert f"{text}/c.jsonl:1: not a line of JSON" in capsys.readouterr().err
    assert prepare(text, tmp_path / "P", "--on-error", "skip") == 0
    printed = capsys.readouterr()
    assert f"skipped {text}/c.jsonl:1: not a line of JSON" in printed.err
    assert "2 documents" in printed.out
    assert "1 skipped" in printed.out


def test_input_left_out_is_counted_in_the_summary_and_in_the_manifest(text, tmp_path, capsys):
    for name, content in (
        ("c.png", "x"),
        ("d.json", "[1]"),
        ("e.jsonl", '{"text": ""}\n'),
        ("f.txt", ""),
    ):
        (text / name).write_text(content)
    assert prepare(text, tmp_path / "P") == 0
    assert read_manifest(tmp_path / "P").left_out == {
        "*.json that are not JSON lines": 1,
        "*.png": 1,
        "empty documents": 1,
        "empty files": 1,
    }
    assert "1 *.png" in capsys.readouterr().out


def test_a_document_longer_than_the_limit_is_an_error_or_skipped(text, tmp_path, capsys):
    records = [{"text": "x" * 500}, {"text": "short"}]
    (text / "c.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    prefix = tmp_path / "P"
    assert prepare(text, prefix, "--max-document-bytes", "400") == DataError.exit_code
    assert "c.jsonl:1" in capsys.readouterr().err
    assert prepare(text, prefix, "--max-document-bytes", "400", "--on-error", "skip") == 0
    manifest = read_manifest(prefix)
    assert (manifest.documents, manifest.skipped) == (3, 1)
    # A document that was skipped with one limit is read with a higher one.
    arguments = ["--input", str(text), "--output-prefix", str(prefix)]
    tokenizer = ["--tokenizer-model", str(tmp_path / "tokenizer.model")]
    assert main([*arguments, *tokenizer, "--max-document-bytes", "600"]) == 0
    assert read_manifest(prefix).documents == 4


def test_pipes_and_standard_input_are_read_beside_files(text, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode())))
    read, write = os.pipe()
    os.write(write, json.dumps({"text": TEXT}).encode())
    os.close(write)
    inputs = ["--input", f"/dev/fd/{read}", str(text), "-", "--stdin-format", "txt"]
    outputs = ["--output-prefix", str(tmp_path / "P"), "--vocab-size", "320"]
    assert main([*inputs, *outputs]) == 0
    os.close(read)
    manifest = read_manifest(tmp_path / "P")
    assert (manifest.documents, manifest.bytes) == (4, 4 * len(TEXT))
    assert not list(tmp_path.glob("P.work*"))


def test_the_summary_has_the_histogram_of_lengths(text, tmp_path, capsys):
    assert prepare(text, tmp_path / "P") == 0
    assert "tokens, from   documents\n" in capsys.readouterr().out


def test_an_error_is_one_message_and_its_exit_code(tmp_path, capsys):
    arguments = ["--input", str(tmp_path / "none"), "--output-prefix", str(tmp_path / "P")]
    assert main(arguments) == DataError.exit_code
    assert capsys.readouterr().err == f"input {tmp_path / 'none'} does not exist. Set --input.\n"


def test_a_prefix_that_cannot_be_written_is_named(text, tmp_path, capsys):
    prefix = text / "a.txt" / "P"
    assert prepare(text, prefix) == DataError.exit_code
    assert f"{prefix} cannot be written: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one source of text is needed. Set --input or --python-library."),
        (["--input", "a", "--python-library"], "exactly one source of text is needed"),
        (
            ["--input", "a", "--vocab-size", "9", "--tokenizer-model", "m"],
            "Remove --vocab-size or --tokenizer-model.",
        ),
        (
            ["--input", "a", "--vocab-size", "-9"],
            "vocab_size -9 must be above 0. Set --vocab-size.",
        ),
        (
            ["--input", "a", "--eod-token", "</s>"],
            "Remove --eod-token.",
        ),
        (
            ["--input", "a", "--max-document-bytes", "0"],
            "must be at least 1. Set --max-document-bytes.",
        ),
        (["--input", "a", "--workers", "0"], "workers 0 must be at least 1. Set --workers."),
    ],
)
def test_invalid_or_conflicting_options_are_refused(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--output-prefix", str(tmp_path / "P")]) == ConfigError.exit_code
    assert message in capsys.readouterr().err


def test_help_names_the_default_vocabulary(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"0: {DEFAULT_VOCAB_SIZE}." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config"])
def test_a_prefix_whose_manifest_would_be_the_tokenizers_file_is_refused(tmp_path, capsys, name):
    assert main(["--input", "a", "--output-prefix", str(tmp_path / name)]) == ConfigError.exit_code
    stderr = capsys.readouterr().err
    assert f"{name}.json is the tokenizer's own file. Set --output-prefix" in stderr


@pytest.mark.parametrize("folder", [".", "/", ".."])
def test_a_folder_as_prefix_or_tokenizer_is_refused(text, tmp_path, capsys, folder):
    assert main(["--input", str(text), "--output-prefix", folder]) == ConfigError.exit_code
    stderr = capsys.readouterr().err
    assert f"{folder} is a folder" in stderr
    assert "Set --output-prefix" in stderr
    arguments = ["--input", str(text), "--output-prefix", str(tmp_path / "P")]
    assert main([*arguments, "--tokenizer-model", folder]) == DataError.exit_code
    stderr = capsys.readouterr().err
    assert f"{folder} is a folder" in stderr
    assert "Set --tokenizer-model" in stderr


@pytest.mark.parametrize("trained", [True, False])
def test_the_number_of_skipped_documents_is_named_when_none_is_left(
    text, tmp_path, capsys, trained
):
    first = tmp_path / "first" / "P"
    other = tmp_path / "other.jsonl"
    other.write_text('{"content": "a"}\n' * 3)
    arguments = ["--input", str(other), "--output-prefix", str(tmp_path / "P")]
    arguments += ["--on-error", "skip"]
    if not trained:
        assert prepare(text, first) == 0
        arguments += ["--tokenizer-model", str(first.with_name("tokenizer.model"))]
    assert main(arguments) == DataError.exit_code
    assert "3 were skipped. Set --json-key (now 'text')" in capsys.readouterr().err
