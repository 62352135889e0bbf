"""The command line of inspect_data.py: documents as text, the histogram, the manifest, and errors."""

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
    assert (
        prepare_data(
            [
                "--input",
                str(tmp_path),
                "--output-prefix",
                str(tmp_path / "P"),
                "--vocab-size",
                "280",
            ]
        )
        == 0
    )
    return tmp_path / "P"


def test_the_first_documents_the_manifest_and_the_histogram_are_shown(prefix, capsys):
    capsys.readouterr()
    main([str(prefix)])
    shown = capsys.readouterr().out
    assert "P: 4 documents" in shown
    assert '"vocab_size": 280' in shown
    assert "tokens, from   documents" in shown
    assert [words in shown for words in WORDS] == [True, True, True, False]


def test_documents_are_shown_by_number_and_cut(prefix, capsys):
    capsys.readouterr()
    main([str(prefix), "--documents", "3", "1", "--characters", "4"])
    shown = capsys.readouterr().out
    assert shown.index("\nfour\n... 12 characters more") < shown.index(
        "\ntwo \n... 14 characters more"
    )


def test_a_whole_store_is_verified(prefix, capsys):
    main([str(prefix), "--verify"])
    assert "verified: every token, document end and count" in capsys.readouterr().out


def test_without_a_manifest_less_is_verified_and_said(prefix, capsys):
    manifest_path(prefix).unlink()
    main([str(prefix), "--verify"])
    shown = capsys.readouterr().out
    assert "manifest: none" in shown
    assert "verified: every token; counts need a manifest" in shown


def failure(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main([*arguments])
    return left.value.code, capsys.readouterr().err


def test_damaged_tokens_are_found(prefix, capsys):
    tokens = np.fromfile(bin_path(prefix), dtype=np.uint16)
    tokens[0] = 9999
    tokens.tofile(bin_path(prefix))
    code, told = failure(capsys, str(prefix), "--verify")
    assert code == DataError.exit_code
    assert "document 0 has ids from 1 to 9999, and the tokenizer has 0 to 279" in told


def test_what_is_not_there_is_named(prefix, capsys):
    code, told = failure(capsys, str(prefix), "--documents", "4", "--characters", "-1")
    assert code == ConfigError.exit_code
    assert "document 4 is not in" in told
    assert "which has 0 to 3. Set --documents." in told
    assert "characters -1 must be at least 0. Set --characters." in told
    assert failure(capsys, str(prefix) + "x")[0] == DataError.exit_code
