"""A run with --profile-ring: the ring's figures in metrics, console, monitors and trace."""

import json
from pathlib import Path

import pytest

from tests.programs import free_port, start_rank, working_folder

SMALL = """\
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
parallel: {context_parallel: striped}
data: {data_path: text/tokens, seq_length: 64, split: [0.8, 0.2, 0.0]}
training:
  {train_iters: 4, lr_warmup_iters: 1, global_batch_size: 2, dtype: fp32, eval_interval: 2,
   eval_iters: 1}
logging: {log_interval: 2, metrics_file: metrics.jsonl, csv_dir: tables}
"""
SHARES = "attention_share", "exposed_communication_share", "data_share", "optimizer_share"
FLAGS = "--profile-ring", "--profile-ring-trace", "trace.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return working_folder(tmp_path_factory.mktemp("profiled"), SMALL)


@pytest.fixture(scope="module")
def output(folder) -> str:
    """Return the output of rank 0 of two."""
    port = free_port()
    ranks = [start_rank(rank, port, folder, FLAGS) for rank in range(2)]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    return outputs[0]


def test_every_step_has_shares_and_hops(folder, output):
    steps = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert len(steps) == 4
    for step in steps:
        shares = [step[name] for name in SHARES]
        assert all(share > 0 for share in shares)
        assert sum(shares) < 1, "they do not overlap"
        hops = [(hop["direction"], hop["hop"]) for hop in step["ring_hops"]]
        assert hops == [("forward", 1), ("forward", 2), ("backward", 1), ("backward", 2)]
        assert all(hop["imbalance"] >= 1 for hop in step["ring_hops"])
        assert "missed_rows" not in step, "the log is large enough for a step"


def test_bytes_add_up_over_two_layers_and_two_micro_batches(folder, output):
    step = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])
    # 32 tokens, 32 wide, in float32. With equal heads the backward pass sends queries.
    key_value_bytes = 2 * 32 * 32 * 4
    query_bytes = 2 * 32 * 32 * 4 + 2 * 32 * 2 * 4
    gradient_bytes = 32 * 32 * 4
    expected = [4 * key_value_bytes, 0, 4 * query_bytes, 4 * gradient_bytes]
    assert [hop["bytes"] for hop in step["ring_hops"]] == expected


def test_the_console_has_a_line_for_each_log_interval(output):
    lines = [line for line in output.splitlines() if line.startswith("ring  ")]
    assert len(lines) == 2
    assert all("attention " in line and "exposed communication " in line for line in lines)
    assert output.count("ring trace       trace.json, 2 steps") == 1


def test_monitors_have_the_shares_and_the_slowest_rank(folder, output):
    tables = " ".join(path.name for path in (folder / "tables").rglob("*.csv"))
    assert all(name in tables for name in (*SHARES, "slowest_over_mean"))
    assert "ring_hops" not in tables


def test_the_trace_has_the_third_and_fourth_step_of_both_ranks(folder, output):
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    steps = {(event["pid"], event["name"]) for event in events if event.get("cat") == "step"}
    assert steps == {(rank, f"step {step}") for rank in range(2) for step in (3, 4)}
    optimizers = [event for event in events if event.get("cat") == "optimizer"]
    assert len(optimizers) == 4
