"""The head benchmark and the page that documents its results."""

import functools
import re
import shlex
from pathlib import Path

import pytest
import tyro

from benchmarks import bench_head
from benchmarks.bench_head import Options
from benchmarks.common import MIB
from megatron_ring.errors import ConfigError

SMALL = ["--hidden-size", "8", "--vocab-size", "96", "--chunk-size", "32", "--rounds", "2"]
PAGE = (Path(__file__).parents[2] / "docs" / "benchmarks" / "head.md").read_text()


@pytest.fixture
def run(run_main):
    """Return a function that runs the benchmark for its JSON and its output."""
    return functools.partial(run_main, bench_head, *SMALL)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_time_and_memory_of_both_heads_are_measured(dtype, run):
    document, printed = run("--tokens", "64", "128", "--dtype", dtype)
    assert set(document) == {"device", "options", "results"}
    assert document["options"]["tokens"] == [64, 128]
    lines = printed.splitlines()
    assert dtype in lines[0]
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| 64", "| 128"]
    for result in document["results"]:
        assert set(result) == {
            "tokens",
            "unchunked_seconds",
            "chunked_seconds",
            "ratio",
            "unchunked_bytes",
            "chunked_bytes",
        }
        assert min(result["unchunked_seconds"], result["chunked_seconds"], result["ratio"]) > 0


def test_memory_grows_with_the_tokens_only_for_the_unchunked_head(run):
    short, long = run("--tokens", "64", "256")[0]["results"]
    assert long["unchunked_bytes"] - short["unchunked_bytes"] > 2 * (256 - 64) * 96 * 4
    assert short["chunked_bytes"] == long["chunked_bytes"]
    assert 32 * 96 * 4 <= long["chunked_bytes"] < 2 * 32 * 96 * 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "64", "0"], "tokens 0 .*at least 1.*--tokens"),
        (["--chunk-size", "-1"], "chunk_size -1 .*at least 1.*--chunk-size"),
    ],
)
def test_invalid_options_are_rejected(flags, message, run):
    with pytest.raises(ConfigError, match=message):
        run(*flags)


# ---- docs/benchmarks/head.md ----


def test_the_page_has_the_command_of_its_table():
    (command,) = re.findall(r"^python -m benchmarks.bench_head(.*)$", PAGE, flags=re.MULTILINE)
    options = tyro.cli(Options, args=shlex.split(command))
    assert [int(row[0].replace(",", "")) for row in rows()] == list(options.tokens)


def test_the_table_of_the_page_supports_its_claims():
    """Memory is one chunk whatever the tokens, and time at most 1.1 of the unchunked head."""
    assert "| " + " | ".join(bench_head._COLUMNS) + " |" in PAGE
    assert {float(row[5]) for row in rows()} == {1024 * 32768 * 4 / MIB}
    assert max(float(row[3]) for row in rows()) <= 1.1


def rows() -> list[list[str]]:
    return [
        line.strip("| ").split(" | ")
        for line in PAGE.splitlines()
        if re.match(r"(\| [\d.,]+ ){6}\|", line)
    ]
