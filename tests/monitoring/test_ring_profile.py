"""Ring profiling: sums equal the plan, the slowest rank is found, and the trace is consistent."""

import itertools
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ring.config import Config, ModelConfig
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.hop_cost import backward_bytes, queries_are_lighter
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.context_parallel.visible_rows import are_sent_directly, visible_keys
from megatron_ring.kernels.attention import KERNELS, reference
from megatron_ring.monitoring.ring_profile import recording
from megatron_ring.monitoring.ring_profile.hop_statistics import (
    SHARES,
    StepSums,
    pack_sums,
    step_metrics,
    sum_log,
    summary_line,
)
from megatron_ring.monitoring.ring_profile.recording import TraceRecorder, clock_offset
from megatron_ring.monitoring.ring_profile.report import RingReport, StepTime
from megatron_ring.monitoring.ring_profile.stragglers import StragglerDetector, find_slowest
from megatron_ring.monitoring.ring_profile.trace import COMPUTE_THREAD, ClockOffset, StepLog
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.peers import peers_in_hop
from megatron_ring.parallel.progress import Direction, ProgressTracker
from megatron_ring.parallel.ring_log import Event
from megatron_ring.plan.communication import ring_tensors
from megatron_ring.plan.ring_timeline import visible_pairs_per_hop
from tests.distributed import run_ranks

SECOND = 10**9

# Layout, window, key-value heads.
STRIPED = ("striped", 0, 4)
WINDOWED = ("ring", 9, 4)
GROUPED_HEADS = ("ring", 0, 2)
RINGS = list(itertools.product((2, 3), (STRIPED, WINDOWED, GROUPED_HEADS)))


def config(groups: int) -> Config:
    return Config(model=ModelConfig(hidden_size=32, num_attention_heads=4, num_query_groups=groups))


def run_attention(
    layout: Layout, window: int, groups: int, progress: ProgressTracker, links: ProcessGroups
) -> None:
    """Run one layer's attention forward and backward with the kernel registered as "profiled"."""
    q_BLHD, k_BLGD, v_BLGD = (
        torch.randn(1, layout.shard_length, heads, 8) for heads in (4, groups, groups)
    )
    q_BLHD.requires_grad_()
    attention = ContextParallelAttention(layout, "profiled", links, progress)
    out_BLHD, _ = attention(q_BLHD, k_BLGD, v_BLGD, window)
    out_BLHD.sum().backward()


class SlowKernel:
    """The reference kernel with a delay before every hop."""

    def forward(self, *inputs) -> None:
        time.sleep(0.05)
        reference.forward(*inputs)

    def backward(self, *inputs) -> None:
        time.sleep(0.05)
        reference.backward(*inputs)


def profile_ring(rank: int, world_size: int, folder: Path) -> dict:
    """Return the sums of each of ``RINGS`` of this size, those of a slow rank 1, and the offset."""
    links = ProcessGroups.build(Grid(ring=world_size), rank)
    consensus = Consensus.build()
    KERNELS["profiled"] = reference
    results = {}
    for name, window, groups in (case for size, case in RINGS if size == world_size):
        progress = ProgressTracker.with_work(log_rows=1000)
        layout = Layout(name, 24 * world_size, world_size)
        run_attention(layout, window, groups, progress, links)
        sums = sum_log(progress.log.rows, world_size)
        results[name, window, groups] = sums, progress.work.products
    results |= profile_slow_rank(rank, world_size, links, consensus, folder)
    results["offset"] = offset_of_fast_clock(rank, consensus)
    return results


def profile_slow_rank(
    rank: int, world_size: int, links: ProcessGroups, consensus: Consensus, folder: Path
) -> dict:
    KERNELS["profiled"] = SlowKernel() if rank == 1 else reference
    progress = ProgressTracker.with_work(log_rows=1000)
    stragglers = StragglerDetector(progress, 1.25, consensus)
    recorders = {
        "complete": TraceRecorder(str(folder / f"{world_size}.json"), 1, consensus),
        "cut short": TraceRecorder(str(folder / f"{world_size}-short.json"), 5, consensus),
        "unwritable": TraceRecorder("/dev/null/trace.json", 1, consensus),
    }
    reports = []
    lines = {name: [] for name in recorders}
    for step in (1, 2, 3):
        progress.log.clear()
        began = time.monotonic_ns()
        run_attention(Layout("striped", 24 * world_size, world_size), 0, 4, progress, links)
        seconds = (time.monotonic_ns() - began) / 1e9
        timing = StepTime(step, began, seconds, 0.0, ends_log_interval=step == 3)
        reports.append(stragglers.end(timing))
        for name, recorder in recorders.items():
            lines[name].append(recorder.add(StepLog(timing, progress.log.rows)))
    for name, recorder in recorders.items():
        lines[name].append(recorder.finish())
    return {"reports": reports, "lines": lines, "slow": sum_log(progress.log.rows, world_size)}


def offset_of_fast_clock(rank: int, consensus: Consensus) -> ClockOffset:
    """Return the measured offset where the last rank's clock is a minute fast."""
    true_time = time.monotonic_ns
    last = consensus.ranks - 1
    recording.time.monotonic_ns = lambda: true_time() + (60 * SECOND if rank == last else 0)
    try:
        return clock_offset(consensus)
    finally:
        recording.time.monotonic_ns = true_time


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def profiles(folder) -> dict[int, list[dict]]:
    """The results of each rank, by ring size."""
    return {size: run_ranks(size, profile_ring, folder) for size in (2, 3)}


def test_time_between_two_log_rows_belongs_to_the_first():
    rows = [
        (100, Event.ENTERED, 0, Direction.FORWARD),
        (101, Event.HOP, 1, 2),
        (103, Event.SENT, 512, 1),
        (104, Event.WAITING, 1, 0),
        (107, Event.WAITED, 0, 0),
        (108, Event.RECEIVED, 2, 1),
        (110, Event.HOP, 2, 2),
        (120, Event.LEFT, 0, 0),
        (150, Event.ENTERED, 0, Direction.BACKWARD),
        (151, Event.HOP, 1, 2),
        (155, Event.LEFT, 0, 0),
        (160, Event.OPTIMIZING, 0, 0),
        (167, Event.OPTIMIZED, 0, 0),
        (190, Event.ENTERED, 1, Direction.FORWARD),
        (191, Event.HOP, 1, 2),
        (192, Event.LEFT, 0, 0),
    ]
    sums = sum_log(np.array(rows) * [SECOND, 1, 1, 1], ring_size=2)
    assert sums.compute_2R.tolist() == [[10 - 3 + 2, 10], [5, 0]]
    assert sums.wait_2R.tolist() == [[3, 0], [0, 0]]
    assert sums.bytes_2R.tolist() == [[512, 0], [0, 0]]
    assert sums.optimizer_seconds == 7


def test_an_empty_log_sums_to_zero():
    sums = sum_log(np.empty((0, 4), dtype=np.int64), ring_size=2)
    assert not sums.compute_2R.any()
    assert sums.optimizer_seconds == 0


@pytest.mark.parametrize(("size", "case"), RINGS)
def test_each_hop_sends_the_planned_bytes(size, case, profiles):
    name, window, groups = case
    layout = Layout(name, 24 * size, size)
    if are_sent_directly(layout, Mask(window)):
        assert_read_rows_are_sent(layout, window, [of_rank[case][0] for of_rank in profiles[size]])
        return
    q_BLHD, kv_2BLGD = ring_tensors(config(groups), Grid(ring=size), layout, torch.float32)
    lighter = min(backward_bytes(q_BLHD, kv_2BLGD).values())
    accumulators = (q_BLHD if queries_are_lighter(q_BLHD, kv_2BLGD) else kv_2BLGD).nbytes
    forward = [kv_2BLGD.nbytes] * (size - 1) + [0]
    backward = [0]
    if size > 1:
        backward = [lighter - accumulators, *[lighter] * (size - 2), accumulators]
    for of_rank in profiles[size]:
        sums, _ = of_rank[case]
        assert sums.bytes_2R.tolist() == [forward, backward]
        assert (sums.compute_2R > 0).all()


def assert_read_rows_are_sent(layout: Layout, window: int, sums: list) -> None:
    """Each hop starts the exchange for the next, with the keys that its receiver reads."""
    for rank, of_rank in enumerate(sums):
        receivers = [
            peers_in_hop(rank, layout.ring_size, hop).receiver for hop in range(1, layout.ring_size)
        ]
        rows = [len(visible_keys(layout, receiver, rank, Mask(window))) for receiver in receivers]
        bytes_of_row = of_rank.bytes_2R[0].sum() / max(1, sum(rows))
        assert of_rank.bytes_2R[0].tolist() == [bytes_of_row * n for n in [*rows, 0]]


@pytest.mark.parametrize("size", [2, 3])
def test_the_work_of_a_rank_follows_from_its_mask(size, profiles):
    """Where keys travel, forward and backward have the same query-key pairs of 4 heads.

    Forward computes two products of each pair, backward five.
    """
    pairs_RR = visible_pairs_per_hop(Layout("ring", 24 * size, size)).work_RR
    products = [of_rank[GROUPED_HEADS][1] for of_rank in profiles[size]]
    assert products == (4 * (2 + 5) * pairs_RR.sum(dim=0)).tolist()


@pytest.mark.parametrize("size", [2, 3])
def test_a_slow_rank_computes_longer_and_the_next_one_waits(size, profiles):
    slow, following = (profiles[size][rank]["slow"] for rank in (1, 2 % size))
    assert slow.compute_2R.sum() > 2 * following.compute_2R.sum()
    assert slow.wait_2R.sum() < following.wait_2R.sum()


@pytest.mark.parametrize("size", [2, 3])
def test_rank_0_reports_a_slow_rank_once_per_log_interval(size, profiles):
    first, second, third = profiles[size][0]["reports"]
    assert first == second == RingReport()
    assert third.metrics["slowest_rank"] == 1
    assert 1.25 < third.metrics["slowest_over_mean"] <= size
    assert third.lines[0].startswith("straggler        rank 1 (")
    for of_rank in profiles[size][1:]:
        assert of_rank["reports"] == [RingReport()] * 3


def test_a_rank_with_more_work_may_take_longer():
    products = np.array([10.0, 20.0, 30.0])
    _, over_mean = find_slowest(np.array([1.0, 2.0, 3.0]), products)
    assert over_mean == pytest.approx(1.0)
    slowest = find_slowest(np.array([1.0, 2.0, 6.0]), products)
    assert slowest == (2, pytest.approx(6 / (3 * 1.5)))


def test_a_rank_with_less_work_is_not_expected_to_be_faster():
    """Hops have costs besides their work, so time per work would single out the least loaded."""
    _, over_mean = find_slowest(np.array([2.0, 3.0]), np.array([1.0, 100.0]))
    assert over_mean < 1


def test_with_equal_work_the_slowest_rank_is_found():
    slowest = find_slowest(np.array([1.0, 1.0, 2.5, 1.0]), np.full(4, 7.0))
    assert slowest == (2, pytest.approx(2.5 / 1.375))


def step_sums(compute: list[list[float]]) -> StepSums:
    compute_2R = np.array(compute)
    return StepSums(compute_2R, compute_2R / 4, compute_2R * 1000, optimizer_seconds=0.5)


def test_metrics_are_means_over_ranks_and_imbalance_is_of_the_worst_ring():
    of_ranks = [step_sums([[seconds, 0], [0, 1]]) for seconds in (1, 1, 1, 3)]
    packed = np.stack([pack_sums(sums, 0, 10.0, 0.1) for sums in of_ranks])
    metrics = step_metrics(packed, rings=[[0, 1], [2, 3]])
    assert [metrics[name] for name in SHARES] == pytest.approx([0.25, 0.0625, 0.01, 0.05])
    assert metrics["ring_hops"] == [
        {"direction": "forward", "hop": 1, "compute_seconds": 1.5, "wait_seconds": 0.375,
         "bytes": 1500, "imbalance": 1.5},
        {"direction": "backward", "hop": 2, "compute_seconds": 1.0, "wait_seconds": 0.25,
         "bytes": 1000, "imbalance": 1.0},
    ]  # fmt: skip
    line = summary_line([metrics])
    for part in (
        "attention 25.0%, exposed communication 6.2%, data 1.0%, optimizer 5.0%",
        "forward hop 1, 1.50",
    ):
        assert part in line


def test_missed_log_rows_are_reported():
    packed = pack_sums(step_sums([[1, 0], [0, 1]]), 3, 10.0, 0.1)
    metrics = step_metrics(packed[None], rings=[[0]])
    assert metrics["missed_rows"] == 3
    assert "3 rows did not fit" in summary_line([metrics])


@pytest.mark.parametrize("size", [2, 3])
def test_rank_0_reports_the_trace_when_it_is_complete_or_the_run_ends(size, profiles, folder):
    on_rank_0, *others = (of_rank["lines"] for of_rank in profiles[size])
    complete = folder / f"{size}.json"
    short = folder / f"{size}-short.json"
    *before, [line], after = on_rank_0["complete"]
    assert (before, after) == ([[], []], [])
    assert line.startswith(f"ring trace       {complete}, 1 step; open it in")
    *before, [line] = on_rank_0["cut short"]
    assert before == [[], [], []]
    assert line.startswith(f"ring trace       {short}, 1 step; open it in")
    assert on_rank_0["unwritable"][2][0].startswith(
        "ring trace       not written: /dev/null/trace.json: "
    )
    assert complete.exists()
    assert short.exists()
    for lines in others:
        assert lines == {name: [[]] * 4 for name in on_rank_0}


def test_a_run_too_short_for_a_trace_reports_that():
    recorder = TraceRecorder("trace.json", 1, consensus=None)
    log = StepLog(StepTime(1, 0, 1.0, 0.0, ends_log_interval=True), None)
    assert recorder.add(log) == []
    assert recorder.add(log) == []
    [line] = recorder.finish()
    assert "not written" in line
    assert "third step" in line


def read_slices(trace: Path) -> list[dict]:
    events = json.loads(trace.read_text())["traceEvents"]
    return [event for event in events if event["ph"] == "X"]


@pytest.mark.parametrize("size", [2, 3])
def test_the_trace_has_every_hop_of_every_rank_and_arrows_between_transfers(size, profiles, folder):
    trace = json.loads((folder / f"{size}.json").read_text())
    events = trace["traceEvents"]
    slices = read_slices(folder / f"{size}.json")
    kinds = Counter((event["pid"], event["cat"]) for event in slices)
    for rank in range(size):
        assert [kinds[rank, kind] for kind in ("step", "pass", "hop")] == [1, 2, 2 * size]
        assert kinds[rank, "exchange"] == 3 * (size - 1)
    hops = [event["args"] for event in slices if event["cat"] == "hop"]
    directions = {hop["direction"] for hop in hops if hop["hop"] == 2}
    assert directions == {"forward", "backward"}
    starts = sorted(event["id"] for event in events if event["ph"] == "s")
    ends = sorted(event["id"] for event in events if event["ph"] == "f")
    assert starts == ends
    assert len(set(starts)) == len(starts) == size * 3 * (size - 1)
    clock_errors = trace["otherData"]["clock_error_microseconds_by_rank"]
    assert set(clock_errors) == {str(rank) for rank in range(size)}


@pytest.mark.parametrize("size", [2, 3])
def test_slices_of_a_thread_are_nested_or_disjoint(size, profiles, folder):
    slices = read_slices(folder / f"{size}.json")
    for thread in {(event["pid"], event["tid"]) for event in slices}:
        of_thread = [event for event in slices if (event["pid"], event["tid"]) == thread]
        spans = [
            (round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3))
            for event in of_thread
        ]
        spans.sort(key=lambda span: (span[0], -span[1]))
        for (began, ended), (later_began, later_ended) in itertools.combinations(spans, 2):
            assert later_began >= ended or later_ended <= ended, (thread, began)
        if thread[1] != COMPUTE_THREAD:
            assert {event["cat"] for event in of_thread} == {"exchange"}


@pytest.mark.parametrize("size", [3])
def test_a_hop_names_the_ring_rank_whose_data_it_processes(size, profiles, folder):
    sources = {"forward": {}, "backward": {}}
    for event in read_slices(folder / f"{size}.json"):
        if event["cat"] == "hop":
            hop = event["args"]
            sources[hop["direction"]][event["pid"], hop["hop"]] = hop["source"]
    pairs = list(itertools.product(range(size), range(size)))
    assert sources["forward"] == {(rank, hop + 1): (rank - hop) % size for rank, hop in pairs}
    # With a key-value head for each query head, queries travel backward.
    assert sources["backward"] == {(rank, hop + 1): (rank + hop) % size for rank, hop in pairs}


@pytest.mark.parametrize("size", [2, 3])
def test_clock_offsets_are_within_the_reported_error(size, profiles):
    *same, fast = (of_rank["offset"] for of_rank in profiles[size])
    assert all(abs(offset.nanoseconds) <= offset.error for offset in same)
    assert abs(fast.nanoseconds + 60 * SECOND) <= fast.error < SECOND
