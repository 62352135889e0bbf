"""The loader benchmark: its rows, the memory of a rank, and the options that it rejects."""

import functools

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
def run(run_main):
    """Return a function that runs the benchmark for its JSON and its output."""
    return functools.partial(run_main, bench_loader, *SMALL)


def test_every_packing_is_measured_joined_and_apart(run):
    document, printed = run()
    rows = [(result["packing"], result["documents"]) for result in document["results"]]
    kinds = ("concatenate", "greedy", "best-fit", "balanced")
    assert rows == [(packing, documents) for packing in kinds for documents in ("joined", "apart")]
    assert all(result["tokens_per_second"] > 0 for result in document["results"])
    lines = printed.splitlines()
    assert [tuple(line.strip("| ").split(" | ")[:2]) for line in lines[-len(rows) :]] == rows


@pytest.mark.parametrize("row", [0, 1], ids=["joined", "apart"])
def test_a_rank_holds_its_own_tokens_and_not_the_whole_sample(run, row):
    """A rank holds an eighth of the 32,768 tokens and as many targets, of 8 bytes each.

    Document ends are searched in one byte per token.
    """
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
    peak = run(*long)[0]["results"][row]["peak_bytes"]
    assert 2 * 4096 * 8 < peak < 32768 * 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "0"], "samples 0 .*at least 1.*--samples"),
        (["--tokens", "64"], r"tokens 64 .* 65 \(seq_length \+ 1\).*--tokens.*--seq-length.* 63\."),
        (["--ring-size", "3"], "seq_length 64 "),
    ],
)
def test_invalid_options_are_rejected(run, flags, message):
    with pytest.raises(ConfigError, match=message):
        run(*flags)
