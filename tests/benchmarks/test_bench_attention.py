"""The attention benchmark: its rows, its masks, its baselines and the options that it rejects."""

import functools
import json
import os
import re
import subprocess

import pytest
import torch

from benchmarks import bench_attention
from megatron_ring.errors import ConfigError
from tests.benchmarks import commands
from tests.distributed import fork_processes

SMALL = [
    "--seq-length",
    "48",
    "--heads",
    "2",
    "--kv-heads",
    "1",
    "--head-dim",
    "8",
    "--rounds",
    "1",
]


def bench(*flags: str) -> subprocess.CompletedProcess:
    return commands.run("bench_attention", *SMALL, *flags)


@pytest.fixture
def run_in_process(run_main, monkeypatch):
    """Return a function that runs the benchmark, with forked ranks, for its JSON and output."""
    monkeypatch.setattr(torch.multiprocessing, "spawn", fork_processes)
    # A copy, so that variables set by the benchmark do not leak into other tests.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return functools.partial(run_main, bench_attention, *SMALL)


@pytest.mark.parametrize(
    ("arguments", "setting", "emulated"),
    [
        (["--nproc", "2"], "2 ranks", False),
        (["--emulate-ranks", "3"], "3 emulated ranks, communication not counted", True),
    ],
)
def test_every_layout_and_the_single_process_are_timed(arguments, setting, emulated, tmp_path):
    done = bench(*arguments, "--json", str(tmp_path / "bench.json"))
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "bench.json").read_text())
    assert set(document) == {
        "setting",
        "device",
        "emulated",
        "options",
        "documents",
        "document_count",
        "window",
        "visible_pairs",
        "single",
        "single_seconds",
        "dense_stripe_size",
        "dense_seconds",
        "lighter_seconds",
        "apart_seconds",
        "results",
    }
    assert (document["setting"], document["emulated"]) == (setting, emulated)
    assert document["options"]["seq_length"] == 48
    assert document["visible_pairs"] == 48 * 49 / 2
    assert document["single"] == "torch's causal attention"
    assert document["single_seconds"] > 0
    assert document["dense_seconds"] is document["lighter_seconds"] is None
    assert [result["layout"] for result in document["results"]] == ["ring", "striped", "zigzag"]
    for result in document["results"]:
        assert set(result) == {
            "layout",
            "stripe_size",
            "seconds",
            "speedup_over_ring",
            "bound",
            "efficiency",
            "imbalance_counted",
            "imbalance_timed",
            "cost_per_pair_over_dense",
        }
        assert result["seconds"] > 0
        assert (result["imbalance_timed"] is not None) == emulated
        assert result["cost_per_pair_over_dense"] is None
        assert result["layout"] in done.stdout
    legend = done.stdout[done.stdout.index("\n  stripe: ") :]
    for term in (
        "over ring",
        "bound",
        "efficiency",
        "slowest/mean",
        "timed",
        "pair/dense",
        "dense",
    ):
        assert f"\n  {term}: " in legend


@pytest.mark.parametrize(
    ("flags", "single"),
    [
        (["--documents", "7"], "torch's causal attention, document by document"),
        (["--documents", "7", "--window", "5"], "the ring's kernel"),
        (["--window", "5"], "the ring's kernel"),
    ],
    ids=["documents", "both", "window"],
)
def test_emulated_ranks_apply_documents_and_windows(flags, single, run_in_process):
    document, printed = run_in_process("--emulate-ranks", "3", *flags, "--batch", "2")
    assert document["documents"] == ("7" if "--documents" in flags else "0")
    assert document["window"] == (5 if "--window" in flags else 0)
    assert 2 * 48 < document["visible_pairs"] < 2 * 48 * 49 / 2
    assert f"{document['visible_pairs']:,} visible pairs" in printed
    assert document["single"] == single
    for result in document["results"]:
        assert result["seconds"] > 0
        assert result["bound"] >= 1
        assert result["cost_per_pair_over_dense"] is None


@pytest.mark.parametrize("window", [0, 5])
def test_cost_per_pair_is_relative_to_the_dense_ring(window, run_in_process):
    document, printed = run_in_process(
        "--nproc", "2", "--documents", "7", "--window", str(window), "--batch", "2"
    )
    assert document["document_count"] > 4
    dense = document["dense_seconds"] / (2 * 48 * 49 / 2)
    for result in document["results"]:
        cost = result["seconds"] / document["visible_pairs"]
        assert result["cost_per_pair_over_dense"] == pytest.approx(cost / dense)
    assert "\ndense" in printed


@pytest.mark.parametrize(
    "flags", [[], ["--documents", "7", "--batch", "2"]], ids=["causal", "documents"]
)
def test_baseline_is_the_published_ring_where_ours_sends_queries(flags, run_in_process):
    """With as many key-value heads as query heads, speedups are over the published ring."""
    document, printed = run_in_process("--nproc", "2", "--kv-heads", "2", *flags)
    ring, striped, *_ = document["results"]
    assert document["lighter_seconds"] > 0
    assert ring["seconds"] != document["lighter_seconds"]
    assert striped["speedup_over_ring"] == ring["seconds"] / striped["seconds"]
    assert "\nlighter" in printed


@pytest.mark.parametrize(
    ("ranks", "flags", "stripe"),
    [
        ("2", [], 256),
        ("2", ["--attention-kernel", "reference"], 1),
        ("2", ["--documents", "100"], 1),
        ("2", ["--documents", "100", "--stripe-size", "16"], 16),
    ],
)
def test_stripe_size_is_the_one_of_training_or_the_requested_one(
    ranks, flags, stripe, run_in_process
):
    document, _ = run_in_process(
        "--emulate-ranks", ranks, "--seq-length", "1024", "--rounds", "0", *flags
    )
    sizes = {result["layout"]: result["stripe_size"] for result in document["results"]}
    placed = {"placed": stripe} if "--documents" in flags else {}
    assert sizes == {"ring": 1, "striped": stripe, "zigzag": 1} | placed


def test_zero_rounds_count_the_work_and_time_nothing(run_in_process):
    document, printed = run_in_process(
        "--emulate-ranks", "8", "--seq-length", "8192", "--documents", "500", "--rounds", "0"
    )
    of = {result["layout"]: result["imbalance_counted"] for result in document["results"]}
    assert of["striped"] <= 1.01 < min(of["ring"], of["zigzag"])
    assert {result["seconds"] for result in document["results"]} == {None}
    assert "counted, not timed" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stripe-size", "7"], "seq_length 48 .*striped.* 2 ring ranks"),
        (["--rounds", "-1"], "rounds -1 .* at least 0.*--rounds"),
        (["--emulate-ranks", "-1"], "emulate_ranks -1 .* at least 0.*--emulate-ranks"),
    ],
)
def test_invalid_options_are_rejected_before_ranks_start(flags, message, run_in_process):
    with pytest.raises(ConfigError, match=message):
        run_in_process(*flags)


def test_documents_that_end_with_shards_are_also_attended_apart(run_in_process):
    """Two documents fill a block, so blocks read nothing of each other."""
    document, printed = run_in_process(
        "--nproc", "2", "--seq-length", "1024", "--documents", "equal:64"
    )
    assert document["apart_seconds"] > 0
    assert "\napart" in printed
    placed = next(result for result in document["results"] if result["layout"] == "placed")
    assert placed["imbalance_counted"] < 1.02
    assert document["document_count"] == 16


@pytest.mark.parametrize("documents", ["7.5", "-1", "equal:0", "histogramm", "equal"])
def test_documents_that_are_no_lengths_are_rejected(documents, run_in_process):
    with pytest.raises(ConfigError, match="documents .*equal:LENGTH.*--documents"):
        run_in_process(f"--documents={documents}")


def test_length_that_does_not_fit_the_layout_exits_with_2():
    done = bench("--seq-length", "47")
    assert done.returncode == 2
    assert re.search("seq_length 47 .*ring.* 2 ring ranks", done.stderr)
    assert "Traceback" not in done.stderr
