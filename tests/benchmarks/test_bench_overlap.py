"""The overlap benchmark on two ranks over an unlimited link: its rows and what it derives."""

import json
import re
import subprocess
import sys

import pytest

from tests.benchmarks import commands
from tests.programs import free_port

HEADS = 2
KV_HEADS = 1
HEAD_DIM = 8
SMALL = [
    "--ratios",
    "--tokens",
    "64",
    "128",
    "--heads",
    str(HEADS),
    "--kv-heads",
    str(KV_HEADS),
    "--head-dim",
    str(HEAD_DIM),
    "--rounds",
    "1",
]
FLOAT32_BYTES = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[list[dict], list[str]]:
    """Return the rows that two ranks write and the lines that they print."""
    file = tmp_path_factory.mktemp("overlap") / "overlap.json"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        free_port(),
    ]
    environment = commands.ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}
    command = [*launcher, "-m", "benchmarks.bench_overlap", *SMALL, "--json", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())["rows"], done.stdout.splitlines()


def test_without_ratios_there_is_one_row_per_length_on_the_unlimited_link(run):
    rows, lines = run
    assert [(row["tokens"], row["mbit"]) for row in rows] == [(64, None), (128, None)]
    end = next(n for n, line in enumerate(lines) if line.startswith("  compute: "))  # the legend
    assert [line.split()[:2] for line in lines[end - 2 : end]] == [["64", "none"], ["128", "none"]]
    assert any(line.startswith("  needs: ") for line in lines)


def test_exposed_time_is_what_messages_add_to_computation(run):
    rows, _ = run
    for row in rows:
        compute = row["compute"]
        communication = row["communication"]
        together = row["together"]
        assert row["exposed"] == pytest.approx(1 - compute / together)
        assert row["over_max"] == pytest.approx(together / max(compute, communication))
        assert 0 < row["waited"] < 1


def test_bytes_are_those_that_the_ring_sends(run):
    """Two ranks send K and V once forward, once backward, and their gradients back, in float32."""
    rows, _ = run
    for row in rows:
        k_and_v = 2 * row["tokens"] * KV_HEADS * HEAD_DIM * FLOAT32_BYTES
        assert row["bytes_per_second"] * row["communication"] == pytest.approx(3 * k_and_v)


def test_messages_can_be_hidden_from_the_larger_of_two_token_counts_on(run):
    rows, _ = run
    kv_bytes = 2 * KV_HEADS * HEAD_DIM * FLOAT32_BYTES  # per token; with their gradients: twice
    for row in rows:
        tokens = row["tokens"]
        needs = []
        for products, nbytes, rate in zip(
            (2, 5), (kv_bytes, 2 * kv_bytes), row["flops_per_second"]
        ):
            send_seconds = nbytes * tokens / row["bytes_per_second"]
            hop_operations = products * 2 * HEADS * HEAD_DIM * tokens**2 / 2
            hop_seconds = hop_operations / rate
            needs.append(tokens * send_seconds / hop_seconds)
        assert row["needs"] == pytest.approx(needs)
        assert row["can_hide"] == (max(row["needs"]) <= tokens)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "rounds 0 .*at least 1.*--rounds"),
        (["--tokens", "0"], "tokens 0 .*at least 1.*--tokens"),
        (["--ratios", "-1"], r"ratio -1\.0 .*above 0.*--ratios"),
    ],
)
def test_invalid_options_and_a_single_rank_are_rejected(flags, message):
    refused = commands.run("bench_overlap", *flags)
    assert refused.returncode == 2
    first, second = refused.stderr.splitlines()
    assert re.fullmatch(f"ConfigError: {message}.", first)
    assert re.search(
        "ring of 1 rank .*at least 2 ranks.*slow_link.*torchrun --nproc-per-node 2", second
    )
