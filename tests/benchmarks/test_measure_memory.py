import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure_memory
from benchmarks.measure_memory import LiveBytes, Measured, bytes_a_token, longest_that
from megatron_ring.errors import ConfigError
from megatron_ring.plan.memory import ERROR
from tests.benchmarks import commands
from tests.distributed import fork_processes

ROOT = Path(__file__).parents[2]


def test_live_bytes_are_counted_within_operators_and_between_them():
    with LiveBytes() as live:
        kept = torch.ones(1000)
        torch.ones(500)
        _ = kept.sort()[0][:10].clone()  # values and indices are gone at the end
    assert live.after == pytest.approx(4000, abs=256)
    assert live.peak >= 4000 + 4000 + 8000


def test_a_peak_that_is_forgotten_leaves_what_still_lives():
    with LiveBytes() as live:
        kept = torch.ones(1000)
        torch.ones(50_000)
        live.forget_peak()
        kept + 1
    assert live.peak == pytest.approx(8000, abs=256)


@pytest.mark.parametrize("guess", [0, 10, 52, 640])
@pytest.mark.parametrize("limit", [0, 1, 5, 64, 100])
def test_the_longest_that_fits_is_found_wherever_it_is_sought_from(limit, guess):
    tried = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= limit * 10

    assert longest_that(fits, 10, guess) == limit * 10
    assert len(tried) == len(set(tried)) <= 16


def test_a_good_guess_saves_trials():
    tried = []
    assert longest_that(lambda length: tried.append(length) or length <= 990, 10, guess=1000) == 990
    assert tried == [1000, 990]


def test_a_further_token_costs_what_two_lengths_differ_by():
    rows = [Measured(2, length, 1000 + 30 * length // 2, None, 0) for length in (10, 20, 50)]
    assert bytes_a_token(rows) == 30


def test_the_command_starts_ranks_of_its_own_and_says_what_their_memory_was():
    done = commands.run("measure_memory", "--nproc", "1", "--seq-lengths", "512")
    assert done.returncode == 0, done.stderr
    ranks, tokens, *mebibytes = done.stdout.splitlines()[1].split()
    assert (ranks, tokens) == ("1", "512")
    live, planned, resident = map(float, mebibytes)
    assert planned == pytest.approx(live, rel=ERROR)
    assert resident > 0


def test_two_ranks_hold_more_tokens_than_one_in_the_same_memory_and_the_plan_knows_it(
    tmp_path, monkeypatch, capsys
):
    """On real ranks, with DeepSpeed: what is measured is told, written, drawn, and was planned."""
    asked = ["--nproc", "1", "2", "--budget-mib", "20", "--step", "256", "--seq-lengths", "512",
             "--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "found.svg")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["measure_memory.py", *asked])
    monkeypatch.setattr(torch.multiprocessing, "spawn", fork_processes)
    monkeypatch.setattr(
        os, "environ", dict(os.environ)
    )  # what the tool sets, no other test must find
    measure_memory.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["longest"]["2"] > found["longest"]["1"] > 0
    for row in found["measured"]:
        assert row["planned"] <= (1 + ERROR) * row["live"]
        # Between ranks live bytes may be told too high: what gloo's threads free is not seen. Alone, on a busy machine,
        # they were once 12% too high, and otherwise within the error, as the test above has it.
        assert row["planned"] >= (1 - 2 * ERROR) * row["live"] or row["nproc"] > 1
        assert (row["resident"] is not None) == (row["seq_length"] == 512)
    assert (
        f"20 MiB a rank: {found['longest']['2']:,} tokens at most on 2" in capsys.readouterr().out
    )
    assert (tmp_path / "found.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing to measure. Set --seq-lengths or --budget-mib."),
        (["--budget-mib", "-1"], "Budgets must not be below 0"),
        (["--nproc", "0", "--seq-lengths", "8"], "ranks at least 1"),
        (["--seq-lengths", "0"], "seq_length 0 must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_starts(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["measure_memory.py", *arguments])
    with pytest.raises(ConfigError, match=message):
        measure_memory.main()
