import json
import sys

import pytest

from benchmarks import bench_loader
from megatron_ring.errors import ConfigError

SMALL = [
    "--seq-length",
    "64",
    "--tokens",
    "4000",
    "--document-length",
    "20",
    "--samples",
    "3",
    "--rounds",
    "2",
]


@pytest.fixture
def told(monkeypatch, tmp_path, capsys):
    """What is written to the file, and the lines that are printed."""

    def run(*arguments: str) -> tuple[dict, list[str]]:
        asked = ["bench_loader.py", *SMALL, *arguments, "--json", str(tmp_path / "bench.json")]
        monkeypatch.setattr(sys, "argv", asked)
        bench_loader.main()
        return json.loads(
            (tmp_path / "bench.json").read_text()
        ), capsys.readouterr().out.splitlines()

    return run


def test_every_packing_is_timed_and_weighed(told):
    document, printed = told()
    rows = [(result["packing"], result["documents"]) for result in document["results"]]
    kinds = ("concatenate", "greedy", "best-fit")
    assert rows == [(packing, documents) for packing in kinds for documents in ("joined", "apart")]
    assert all(result["tokens_per_second"] > 0 for result in document["results"])
    assert [tuple(line.strip("| ").split(" | ")[:2]) for line in printed[-6:]] == rows


@pytest.mark.parametrize("row", [0, 1], ids=["joined", "apart"])
def test_a_rank_holds_its_own_tokens_and_not_the_sample(told, row):
    """Of 32,768 tokens of 8 bytes an eighth lives here, and as many targets; ends are looked for in a byte a token."""
    long = (
        "--seq-length",
        "32768",
        "--tokens",
        "70000",
        "--ring-size",
        "8",
        "--document-length",
        "5000",
    )
    peak = told(*long)[0]["results"][row]["peak_bytes"]
    assert 2 * 4096 * 8 < peak < 32768 * 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "0"], "samples 0 must be at least 1. Set --samples."),
        (["--tokens", "64"], r"tokens 64 fill no sample: it takes 65 \(seq_length \+ 1\)\."),
        (["--ring-size", "3"], "seq_length 64 "),
    ],
)
def test_what_cannot_be_measured(told, flags, message):
    with pytest.raises(ConfigError, match=message):
        told(*flags)
