import json
import subprocess
import sys

import pytest

from tests.benchmarks import commands
from tests.programs import free_port

SMALL = [
    "--ratios",
    "--tokens",
    "64",
    "128",
    "--heads",
    "2",
    "--kv-heads",
    "1",
    "--head-dim",
    "8",
    "--rounds",
    "1",
]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> tuple[list[dict], list[str]]:
    """The rows that two ranks write, and the lines that they print."""
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


def test_a_row_for_each_length_over_a_link_that_is_left_as_it_is(told):
    rows, lines = told
    assert [(row["tokens"], row["mbit"]) for row in rows] == [(64, None), (128, None)]
    assert [line.split()[:2] for line in lines[-2:]] == [["64", "none"], ["128", "none"]]


def test_what_is_exposed_is_what_the_messages_add(told):
    for row in told[0]:
        compute, communication, together = row["compute"], row["communication"], row["together"]
        assert row["exposed"] == pytest.approx(1 - compute / together)
        assert row["over_max"] == pytest.approx(together / max(compute, communication))
        assert 0 < row["waited"] < 1


def test_bytes_are_those_that_the_ring_sends(told):
    """Of two ranks: K and V once forward and once backward, and their gradients home, in float32."""
    for row in told[0]:
        assert row["bytes_per_second"] * row["communication"] == pytest.approx(
            3 * 2 * row["tokens"] * 8 * 4
        )


def test_a_ring_hides_its_messages_from_the_longer_of_two_lengths_on(told):
    for row in told[0]:
        keys = 2 * 8 * 4  # bytes of a token's K and V; backward as much again for their gradients
        seconds = [sent * row["tokens"] / row["bytes_per_second"] for sent in (keys, 2 * keys)]
        flops = [products * 2 * 2 * 8 * row["tokens"] ** 2 / 2 for products in (2, 5)]
        hops = [work / rate for work, rate in zip(flops, row["flops_per_second"])]
        assert row["needs"] == pytest.approx(
            [row["tokens"] * link / hop for link, hop in zip(seconds, hops)]
        )
        assert row["can_hide"] == (max(row["needs"]) <= row["tokens"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--rounds", "0"], "rounds 0 must be at least 1. Set --rounds."),
        (["--tokens", "0"], "tokens 0 must be at least 1. Set --tokens."),
        (["--ratios", "-1"], "ratio -1.0 must be above 0. Set --ratios."),
    ],
)
def test_what_cannot_be_measured_is_refused(asked, said):
    refused = commands.run("bench_overlap", *asked)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert "a ring of one rank sends nothing" in refused.stderr
