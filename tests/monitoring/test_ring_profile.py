"""What is made of a process's log: sums that are those planned, the slowest rank, a trace whose events match."""

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
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.context_parallel.traffic import backward_bytes, queries_are_lighter
from megatron_ring.kernels.attention import KERNELS, reference
from megatron_ring.monitoring.ring_profile import recording
from megatron_ring.monitoring.ring_profile.hop_statistics import (
    SHARES,
    StepSums,
    as_numbers,
    figures,
    summary_line,
    sums,
)
from megatron_ring.monitoring.ring_profile.recording import Recorder, offset_to_rank_0
from megatron_ring.monitoring.ring_profile.report import RingReport, StepTime
from megatron_ring.monitoring.ring_profile.stragglers import Stragglers, slowest
from megatron_ring.monitoring.ring_profile.trace import COMPUTE, StepLog
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.progress import Direction, ProgressTracker
from megatron_ring.parallel.ring_log import Event
from megatron_ring.plan.messages import ring_tensors
from megatron_ring.plan.timeline import counted
from tests.distributed import run_ranks

SECOND = 10**9
STRIPED, CUT, SHARED_HEADS = (
    ("striped", 0, 4),
    ("ring", 9, 4),
    ("ring", 0, 2),
)  # layout, window, key-value heads
RINGS = list(itertools.product((2, 3), (STRIPED, CUT, SHARED_HEADS)))


def config(groups: int) -> Config:
    return Config(model=ModelConfig(hidden_size=32, num_attention_heads=4, num_query_groups=groups))


def passes(
    layout: Layout, window: int, groups: int, place: ProgressTracker, links: ProcessGroups
) -> None:
    """A layer's attention, forward and backward, with the kernel that is called "noted"."""
    q_BLHD, k_BLGD, v_BLGD = (
        torch.randn(1, layout.shard_length, heads, 8) for heads in (4, groups, groups)
    )
    q_BLHD.requires_grad_()
    attention = ContextParallelAttention(layout, "noted", links, place)
    out_BLHD, _ = attention(q_BLHD, k_BLGD, v_BLGD, window)
    out_BLHD.sum().backward()


class Slow:
    """The reference kernel, with a rest before every hop."""

    def forward(self, *inputs) -> None:
        time.sleep(0.05)
        reference.forward(*inputs)

    def backward(self, *inputs) -> None:
        time.sleep(0.05)
        reference.backward(*inputs)


def in_a_ring(rank: int, world_size: int, folder: Path) -> dict:
    """What each of ``RINGS`` of this size logged; then what is found where rank 1 is slow, and how far clocks are."""
    links, consensus = ProcessGroups.build(Grid(ring=world_size), rank), Consensus.build()
    KERNELS["noted"] = reference
    found = {}
    for name, window, groups in (case for size, case in RINGS if size == world_size):
        place = ProgressTracker.with_work(log_rows=1000)
        passes(Layout(name, 24 * world_size, world_size), window, groups, place, links)
        found[name, window, groups] = sums(place.log.rows, world_size), place.work.products
    return (
        found
        | slow_second(rank, world_size, links, consensus, folder)
        | {"clock": apart(rank, consensus)}
    )


def slow_second(
    rank: int, world_size: int, links: ProcessGroups, consensus: Consensus, folder: Path
) -> dict:
    KERNELS["noted"] = Slow() if rank == 1 else reference
    place, ring = ProgressTracker.with_work(log_rows=1000), list(range(world_size))
    stragglers = Stragglers(place, 1.25, consensus)
    recorders = {
        "whole": Recorder(str(folder / f"{world_size}.json"), 1, ring, consensus),
        "cut short": Recorder(str(folder / f"{world_size}-short.json"), 5, ring, consensus),
        "unwritable": Recorder("/dev/null/trace.json", 1, ring, consensus),
    }
    reports, lines = [], {name: [] for name in recorders}
    for step in (1, 2, 3):
        place.log.clear()
        began = time.monotonic_ns()
        passes(Layout("striped", 24 * world_size, world_size), 0, 4, place, links)
        took = StepTime(step, began, (time.monotonic_ns() - began) / 1e9, 0.0, is_told=step == 3)
        reports.append(stragglers.end(took))
        for name, recorder in recorders.items():
            lines[name].append(recorder.keep(StepLog(took, place.log.rows)))
    for name, recorder in recorders.items():
        lines[name].append(recorder.finish())
    return {"reports": reports, "lines": lines, "slow": sums(place.log.rows, world_size)}


def apart(rank: int, consensus: Consensus) -> recording.Offset:
    """The offset that is found where the last rank's clock is a minute fast."""
    true, last = time.monotonic_ns, consensus.ranks - 1
    recording.time.monotonic_ns = lambda: true() + (60 * SECOND if rank == last else 0)
    try:
        return offset_to_rank_0(consensus)
    finally:
        recording.time.monotonic_ns = true


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def found(folder) -> dict[int, list[dict]]:
    """By ring size, each rank's."""
    return {size: run_ranks(size, in_a_ring, folder) for size in (2, 3)}


def test_between_two_rows_a_process_does_one_thing():
    rows = [
        (100, Event.ENTERED, 0, Direction.FORWARD),
        (101, Event.HOP, 1, 2),
        (103, Event.SENT, 512, 1),
        (104, Event.WAITING, 1, 0),
        (107, Event.WAITED, 0, 0),
        (108, Event.RECEIVED, 103, 1),
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
    found = sums(np.array(rows) * [SECOND, 1, 1, 1], ring_size=2)
    assert found.compute_2R.tolist() == [[10 - 3 + 2, 10], [5, 0]]
    assert found.wait_2R.tolist() == [[3, 0], [0, 0]]
    assert found.bytes_2R.tolist() == [[512, 0], [0, 0]]
    assert found.optimizer_seconds == 7


def test_a_step_without_a_row_sums_to_nothing():
    found = sums(np.empty((0, 4), dtype=np.int64), ring_size=2)
    assert not found.compute_2R.any()
    assert found.optimizer_seconds == 0


@pytest.mark.parametrize(("size", "case"), RINGS)
def test_a_ring_sends_in_each_hop_what_is_planned(size, case, found):
    name, window, groups = case
    layout = Layout(name, 24 * size, size)
    hops = layout.hops(Mask(window).reach(layout.seq_length))
    q_BLHD, kv_2BLGD = ring_tensors(config(groups), Grid(ring=size), layout, torch.float32)
    lighter = min(backward_bytes(q_BLHD, kv_2BLGD).values())
    sums = (q_BLHD if queries_are_lighter(q_BLHD, kv_2BLGD) else kv_2BLGD).nbytes
    rest = [0] * (size - hops)
    forward = [kv_2BLGD.nbytes] * (hops - 1) + [0]
    backward = [lighter - sums, *[lighter] * (hops - 2), sums] if hops > 1 else [0]
    for of_rank in found[size]:
        logged, _ = of_rank[case]
        assert logged.bytes_2R.tolist() == [forward + rest, backward + rest]
        assert (logged.compute_2R > 0).tolist() == [[True] * hops + [False] * len(rest)] * 2


@pytest.mark.parametrize("size", [2, 3])
def test_the_work_of_a_rank_is_that_of_its_mask(size, found):
    """Where keys travel, backward has the same pairs, those of 4 heads: two products of each forward, five backward."""
    pairs_RR = counted(Layout("ring", 24 * size, size)).work_RR
    products = [of_rank[SHARED_HEADS][1] for of_rank in found[size]]
    assert products == (4 * (2 + 5) * pairs_RR.sum(dim=0)).tolist()


@pytest.mark.parametrize("size", [2, 3])
def test_a_slow_rank_computes_and_the_next_waits(size, found):
    slow, behind = (found[size][rank]["slow"] for rank in (1, 2 % size))
    assert slow.compute_2R.sum() > 2 * behind.compute_2R.sum()
    assert slow.wait_2R.sum() < behind.wait_2R.sum()


@pytest.mark.parametrize("size", [2, 3])
def test_a_slow_rank_is_named_once_a_log_interval(size, found):
    first, second, third = found[size][0]["reports"]
    assert first == second == RingReport()
    assert third.figures["slowest_rank"] == 1
    assert 1.25 < third.figures["slowest_over_mean"] <= size
    assert third.lines[0].startswith("straggler        rank 1 (")
    assert all(of_rank["reports"] == [RingReport()] * 3 for of_rank in found[size][1:]), (
        "rank 0 speaks"
    )


def test_who_has_more_to_do_may_take_longer():
    products = np.array([10.0, 20.0, 30.0])
    _, over_mean = slowest(np.array([1.0, 2.0, 3.0]), products)
    assert over_mean == pytest.approx(1.0)
    assert slowest(np.array([1.0, 2.0, 6.0]), products) == (2, pytest.approx(6 / (3 * 1.5)))


def test_who_has_less_to_do_holds_nobody_up():
    """Hops cost something besides their work, so time for work would blame who has the least."""
    _, over_mean = slowest(np.array([2.0, 3.0]), np.array([1.0, 100.0]))
    assert over_mean < 1


def test_equal_work_shows_the_slower_rank():
    assert slowest(np.array([1.0, 1.0, 2.5, 1.0]), np.full(4, 7.0)) == (
        2,
        pytest.approx(2.5 / 1.375),
    )


def step_of(compute: list[list[float]]) -> StepSums:
    compute_2R = np.array(compute)
    return StepSums(compute_2R, compute_2R / 4, compute_2R * 1000, optimizer_seconds=0.5)


def test_figures_are_means_over_ranks_and_imbalance_is_of_the_worst_ring():
    own = [step_of([[seconds, 0], [0, 1]]) for seconds in (1, 1, 1, 3)]
    told = figures(
        np.stack([as_numbers(each, 0, 10.0, 0.1) for each in own]), rings=[[0, 1], [2, 3]]
    )
    assert [told[name] for name in SHARES] == pytest.approx([0.25, 0.0625, 0.01, 0.05])
    assert told["ring_hops"] == [
        {"direction": "forward", "hop": 1, "compute_seconds": 1.5, "wait_seconds": 0.375, "bytes": 1500,
         "imbalance": 1.5},
        {"direction": "backward", "hop": 2, "compute_seconds": 1.0, "wait_seconds": 0.25, "bytes": 1000,
         "imbalance": 1.0},
    ]  # fmt: skip
    line = summary_line([told])
    assert (
        "attention 25.0%, exposed communication 6.2%, data 1.0%, optimizer 5.0%; least even: forward hop 1, 1.50"
        in line
    )


def test_rows_that_were_missed_are_told():
    told = figures(as_numbers(step_of([[1, 0], [0, 1]]), 3, 10.0, 0.1)[None], rings=[[0]])
    assert told["missed_rows"] == 3
    assert "too little, for 3 rows did not fit" in summary_line([told])


@pytest.mark.parametrize("size", [2, 3])
def test_rank_0_says_where_the_trace_is_once_it_is_whole_or_the_run_is_over(size, found, folder):
    said, *others = (of_rank["lines"] for of_rank in found[size])
    whole, short = folder / f"{size}.json", folder / f"{size}-short.json"
    tell = "ring trace       {}, 1 steps; https://ui.perfetto.dev opens it"
    assert said["whole"] == [[], [], [tell.format(whole)], []]
    assert said["cut short"] == [[], [], [], [tell.format(short)]]
    assert said["unwritable"][2][0].startswith(
        "ring trace       not written: /dev/null/trace.json: "
    )
    assert whole.exists()
    assert short.exists()
    assert all(lines == {name: [[]] * 4 for name in said} for lines in others)


def test_a_run_too_short_for_a_trace_says_so():
    recorder = Recorder("trace.json", 1, [0], consensus=None)
    assert (
        recorder.keep(log := StepLog(StepTime(1, 0, 1.0, 0.0, is_told=True), None))
        == recorder.keep(log)
        == []
    )
    assert recorder.finish() == [
        "ring trace       none: it begins with the third step of a run, and there was no third"
    ]


@pytest.mark.parametrize("size", [2, 3])
def test_the_trace_has_every_hop_of_every_rank_and_arrows_between_transfers(size, found, folder):
    trace = json.loads((folder / f"{size}.json").read_text())
    events = trace["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    kinds = Counter((event["pid"], event["cat"]) for event in slices)
    for rank in range(size):
        assert [kinds[rank, kind] for kind in ("step", "pass", "hop")] == [1, 2, 2 * size]
        assert kinds[rank, "exchange"] == 3 * (size - 1)
    hops = [
        event["args"] for event in slices if event["cat"] == "hop" and event["args"]["hop"] == 2
    ]
    assert {hop["direction"] for hop in hops} == {"forward", "backward"}
    starts, ends = (
        sorted(event["id"] for event in events if event["ph"] == phase) for phase in "sf"
    )
    assert starts == ends
    assert len(set(starts)) == len(starts) == size * 3 * (size - 1)
    assert set(trace["otherData"]["clock_error_microseconds_by_rank"]) == {
        str(rank) for rank in range(size)
    }


@pytest.mark.parametrize("size", [2, 3])
def test_slices_of_a_thread_lie_within_or_beside_each_other(size, found, folder):
    slices = [
        event
        for event in json.loads((folder / f"{size}.json").read_text())["traceEvents"]
        if event["ph"] == "X"
    ]
    for thread in {(event["pid"], event["tid"]) for event in slices}:
        of_thread = [event for event in slices if (event["pid"], event["tid"]) == thread]
        spans = [
            (round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3))
            for event in of_thread
        ]
        for (began, ended), (later, end) in itertools.combinations(
            sorted(spans, key=lambda s: (s[0], -s[1])), 2
        ):
            assert later >= ended or end <= ended, (thread, began)
        assert thread[1] == COMPUTE or {event["cat"] for event in of_thread} == {"exchange"}


@pytest.mark.parametrize("size", [3])
def test_a_hop_names_the_ring_rank_that_visits(size, found, folder):
    slices = [
        event
        for event in json.loads((folder / f"{size}.json").read_text())["traceEvents"]
        if event["ph"] == "X"
    ]
    forward = {
        (event["pid"], event["args"]["hop"]): event["args"]["source"]
        for event in slices
        if event["cat"] == "hop" and event["args"]["direction"] == "forward"
    }
    assert forward == {
        (rank, hop + 1): (rank - hop) % size for rank in range(size) for hop in range(size)
    }
    backward = {  # with a key-value head for each query head the queries travel
        (event["pid"], event["args"]["hop"]): event["args"]["source"]
        for event in slices
        if event["cat"] == "hop" and event["args"]["direction"] == "backward"
    }
    assert backward == {
        (rank, hop + 1): (rank + hop) % size for rank in range(size) for hop in range(size)
    }


@pytest.mark.parametrize("size", [2, 3])
def test_clocks_are_brought_to_rank_0_within_the_error_that_is_told(size, found):
    *same, fast = (of_rank["clock"] for of_rank in found[size])
    assert all(abs(offset.nanoseconds) <= offset.error for offset in same)
    assert abs(fast.nanoseconds + 60 * SECOND) <= fast.error < SECOND
