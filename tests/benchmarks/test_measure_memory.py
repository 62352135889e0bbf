"""The memory benchmark: its search, its ranks, and the plan that it compares with."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import measure_memory
from benchmarks.measure_memory import Measured, bytes_per_token, longest_that
from megatron_ring.errors import ConfigError
from megatron_ring.plan.memory import ERROR
from tests.benchmarks import commands
from tests.distributed import fork_processes


@pytest.mark.parametrize("guess", [0, 10, 52, 640])
@pytest.mark.parametrize("limit", [0, 1, 5, 64, 100])
def test_the_longest_that_fits_is_found_from_any_guess(limit, guess):
    tried = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= limit * 10

    assert longest_that(fits, 10, guess) == limit * 10
    assert len(tried) == len(set(tried)) <= 16


def test_a_close_guess_needs_few_trials():
    tried = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= 990

    assert longest_that(fits, 10, guess=1000) == 990
    assert tried == [1000, 990]


def test_bytes_per_token_is_the_slope_between_shortest_and_longest():
    rows = [Measured(2, length, 1000 + 30 * length // 2, None, 0) for length in (10, 20, 50)]
    assert bytes_per_token(rows) == 30


@pytest.mark.exhaustive
def test_the_command_starts_ranks_and_prints_their_memory():
    command = commands.command("measure_memory", "--nproc", "1", "--seq-lengths", "512")
    done = subprocess.run(
        command, env=commands.ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    ranks, tokens, *mebibytes = done.stdout.splitlines()[1].split()
    assert (ranks, tokens) == ("1", "512")
    live, planned, resident = map(float, mebibytes)
    assert planned == pytest.approx(live, rel=ERROR)
    assert resident > 0


def test_two_ranks_fit_more_tokens_than_one_in_the_same_memory_as_planned(
    tmp_path, monkeypatch, capsys
):
    """On real ranks with DeepSpeed, results are printed, written, plotted and close to the plan."""
    results = tmp_path / "memory.json"
    plot = tmp_path / "memory.svg"
    flags = ["--nproc", "1", "2", "--budget-mib", "20", "--step", "256", "--seq-lengths", "512"]
    outputs = ["--json", str(results), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", ["measure_memory.py", *flags, *outputs])
    monkeypatch.setattr(torch.multiprocessing, "spawn", fork_processes)
    # A copy, so that variables set by the benchmark do not leak into other tests.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    measure_memory.main()
    findings = json.loads(results.read_text())
    assert findings["longest"]["2"] > findings["longest"]["1"] > 0
    for row in findings["measured"]:
        assert row["planned"] <= (1 + ERROR) * row["live"]
        # With several ranks live bytes may be too high, because memory that gloo's threads free
        # stays counted. With one rank they were once 12% too high on a busy machine, and otherwise
        # within ERROR, as the test above asserts.
        assert row["planned"] >= (1 - 2 * ERROR) * row["live"] or row["nproc"] > 1
        assert (row["resident"] is not None) == (row["seq_length"] == 512)
    longest = findings["longest"]["2"]
    assert f"20 MiB per rank: at most {longest:,} tokens on 2" in capsys.readouterr().out
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Nothing to measure.*--seq-lengths.*--budget-mib"),
        (["--budget-mib", "-1"], "budget_mib -1 .*at least 0.*--budget-mib"),
        (["--step", "0", "--seq-lengths", "8"], "step 0 .*at least 1.*--step"),
        (["--nproc", "0", "--seq-lengths", "8"], "nproc 0 .*at least 1.*--nproc"),
        (["--seq-lengths", "0"], "seq_length 0 .*at least 1"),
    ],
)
def test_invalid_options_are_rejected_before_ranks_start(flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["measure_memory.py", *flags])
    with pytest.raises(ConfigError, match=message):
        measure_memory.main()
