"""The command line of inspect_data.py: documents, histogram, manifest, and errors."""

from pathlib import Path

import numpy as np
import pytest

from megatron_ring.data.manifest import manifest_path
from megatron_ring.data.tokens import bin_path
from megatron_ring.errors import ConfigError, DataError
from tools.inspect_data import main
from tools.prepare_data import main as prepare_data

WORDS = ["one and another", "two and the others", "three and so on", "four and no more"]


@pytest.fixture
def prefix(tmp_path) -> Path:
    for number, words in enumerate(WORDS):
        (tmp_path / f"{number}.txt").write_text(words)
    prefix = tmp_path / "P"
    arguments = ["--input", str(tmp_path), "--output-prefix", str(prefix), "--vocab-size", "280"]
    assert prepare_data(arguments) == 0
    return prefix


def test_the_first_documents_the_manifest_and_the_histogram_are_printed(prefix, capsys):
    capsys.readouterr()
    main([str(prefix)])
    output = capsys.readouterr().out
    assert "P: 4 documents" in output
    assert '"vocab_size": 280' in output
    assert "tokens, from   documents" in output
    assert [words in output for words in WORDS] == [True, True, True, False]


def test_documents_are_printed_by_number_and_truncated(prefix, capsys):
    capsys.readouterr()
    main([str(prefix), "--documents", "3", "1", "--characters", "4"])
    output = capsys.readouterr().out
    fourth = output.index("\nfour\n... 12 more characters")
    second = output.index("\ntwo \n... 14 more characters")
    assert fourth < second


def test_an_intact_store_is_verified(prefix, capsys):
    main([str(prefix), "--verify"])
    assert "verified: every token, document end and count" in capsys.readouterr().out


def test_without_a_manifest_the_output_names_what_is_not_verified(prefix, capsys):
    manifest_path(prefix).unlink()
    main([str(prefix), "--verify"])
    output = capsys.readouterr().out
    assert "manifest: none" in output
    assert "verified: every token; counts need a manifest" in output


def failure(capsys, *arguments: str) -> tuple[int, str]:
    """Run the command line and return its exit code and what it wrote to stderr."""
    with pytest.raises(SystemExit) as exit_request:
        main([*arguments])
    return exit_request.value.code, capsys.readouterr().err


def test_damaged_tokens_are_found(prefix, capsys):
    tokens = np.fromfile(bin_path(prefix), dtype=np.uint16)
    tokens[0] = 9999
    tokens.tofile(bin_path(prefix))
    code, stderr = failure(capsys, str(prefix), "--verify")
    assert code == DataError.exit_code
    assert "document 0 has ids from 1 to 9999, and the tokenizer has 0 to 279" in stderr


def test_documents_and_stores_that_do_not_exist_are_named(prefix, capsys):
    code, stderr = failure(capsys, str(prefix), "--documents", "4", "--characters", "-1")
    assert code == ConfigError.exit_code
    assert "document 4 is not in" in stderr
    assert "which has 0 to 3. Set --documents." in stderr
    assert "characters -1 must be at least 0. Set --characters." in stderr
    assert failure(capsys, str(prefix) + "x")[0] == DataError.exit_code
