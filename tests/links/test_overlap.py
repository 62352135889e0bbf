"""A ring over limited links: its results, its bytes and what the benchmark derives from its times.

How much of the communication is hidden depends on what else the machine does.
``benchmarks/bench_overlap.py`` measures it and docs/benchmarks/overlap.md has the figures; no test
here depends on a clock.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import commands

pytestmark = pytest.mark.links

ROOT = Path(__file__).parents[2]
SLOW_LINK = commands.command("slow_link")
SETTING = {"tokens": 512, "kv_heads": 2, "head_dim": 16, "rounds": 1}
RATIOS = ["0.35", "1.6"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """The benchmark's rows: without a limit, over the faster link and over the slower one."""
    file = tmp_path_factory.mktemp("overlap") / "overlap.json"
    flags = []
    for name, value in SETTING.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    bench = [*SLOW_LINK, *commands.command("bench_overlap", *flags)]
    command = [*bench, "--ratios", *RATIOS, "--json", file]
    subprocess.run(command, env=commands.ENVIRONMENT, check=True)
    return json.loads(file.read_text())["rows"]


def test_the_limits_of_the_links_have_the_requested_ratio(rows):
    unlimited, fast, slow = rows
    assert unlimited["mbit"] is None
    # Both limits are derived from one measured time.
    assert fast["mbit"] / slow["mbit"] == pytest.approx(1.6 / 0.35)


def test_the_same_bytes_are_sent_over_every_link(rows):
    """K and V once in forward, once in backward, and their gradients, in float32."""
    expected = 3 * 2 * SETTING["tokens"] * SETTING["kv_heads"] * SETTING["head_dim"] * 4
    for row in rows:
        assert row["bytes_per_second"] * row["communication"] == pytest.approx(expected)


def test_a_link_can_be_hidden_if_the_shard_is_as_long_as_the_criterion_needs(rows):
    for row in rows:
        assert row["can_hide"] == (max(row["needs"]) <= SETTING["tokens"])


def test_results_are_right_and_the_same_bits_over_every_link(tmp_path):
    """Each rank compares its results with the float64 oracle before it writes them."""
    results = []
    for name, limit in (("unlimited", []), ("slow", ["--mbit", "20"])):
        folder = tmp_path / name
        folder.mkdir()
        program = [sys.executable, ROOT / "tests" / "links" / "ring_over_link.py"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([*SLOW_LINK, *limit, *program], cwd=folder, env=environment, check=True)
        results.append([torch.load(folder / f"{rank}.pt") for rank in range(2)])
    unlimited, slow = results
    for of_rank, of_rank_over_slow_link in zip(unlimited, slow, strict=True):
        for x, y in zip(of_rank, of_rank_over_slow_link, strict=True):
            assert torch.equal(x, y)
