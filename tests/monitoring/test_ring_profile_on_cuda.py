"""The ring profile on a simulated CUDA device: its times are the device's, and nothing waits."""

import json
import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_ring.config import Config, LoggingConfig, MemoryConfig, ModelConfig, ParallelConfig
from megatron_ring.context_parallel import attention
from megatron_ring.context_parallel.attention import RingSpec, ring_attention
from megatron_ring.kernels.attention import KERNELS
from megatron_ring.monitoring.ring_profile import monitor
from megatron_ring.monitoring.ring_profile.hop_statistics import StepSums, sum_log
from megatron_ring.monitoring.ring_profile.monitor import (
    RingMonitor,
    build_progress_tracker,
    max_rows_per_step,
)
from megatron_ring.monitoring.ring_profile.report import RingReport, StepTime
from megatron_ring.monitoring.ring_profile.trace import ClockOffset, RankLog, StepLog, as_json
from megatron_ring.parallel.collectives import RingExchange
from megatron_ring.parallel.device_clock import DeviceClock
from megatron_ring.parallel.progress import Direction, ProgressTracker
from megatron_ring.parallel.ring_log import WORK_EVENTS, Event
from megatron_ring.settings.run_settings import RunSettings
from tests import simulated_device
from tests.simulated_device import Device, Network

MILLISECOND = 10**6
KERNEL = 2 * MILLISECOND
LOG_ROWS = 1000
LENGTH = 8

# Between two marks lie at most a few calls of the host, whose time a device without work shows.
TOLERANCE = 50 * simulated_device.HOST_CALL / 1e9


@dataclass
class Ring:
    """A ring of simulated devices that runs attention layers.

    Attributes:
        slowdown: by which the kernels of a ring rank take longer.
    """

    network: Network
    size: int
    kv_heads: int = 2
    slowdown: dict[int, int] = field(default_factory=dict)

    def run(self, devices: list[Device], trackers: list[ProgressTracker], body) -> list:
        """Run ``body(device, tracker)`` on every rank; return the results."""

        def on_rank(device: Device):
            tracker = trackers[device.ring_rank]
            device.position = lambda: (tracker.read().direction, tracker.read().hop)
            return body(device, tracker)

        return self.network.on_every_rank(devices, on_rank)

    def attend(self, tracker: ProgressTracker, layer: int = 0, recompute: bool = False) -> None:
        """Run one layer forward and backward."""
        q_BLHD = torch.randn(1, LENGTH, 2, 4, requires_grad=True)
        kv_2BLGD = torch.randn(2, 1, LENGTH, self.kv_heads, 4, requires_grad=True)
        spec = RingSpec("striped", "simulated", links=("a", "b"), layer=layer)

        def forward(q_BLHD: torch.Tensor, kv_2BLGD: torch.Tensor) -> torch.Tensor:
            arguments = spec.to_op_arguments()
            return ring_attention(q_BLHD, kv_2BLGD, None, tracker.buffer, *arguments)[0]

        if recompute:
            out_BLHD = checkpoint(forward, q_BLHD, kv_2BLGD, use_reentrant=False)
        else:
            out_BLHD = forward(q_BLHD, kv_2BLGD)
        out_BLHD.sum().backward()

    def profiled_step(self, device: Device, tracker: ProgressTracker) -> np.ndarray:
        """Run one layer as a step; return the rows of its log."""
        return profile_step(device, tracker, lambda: self.attend(tracker))


@pytest.fixture
def make_ring(monkeypatch):
    """Return a function that creates a Ring of a size; one at a time."""

    def make(size: int, message: int = MILLISECOND, **settings) -> Ring:
        network = Network(message)
        ring = Ring(network, size, **settings)

        def exchange(links: tuple[str, ...], progress: ProgressTracker) -> RingExchange:
            return RingExchange(tuple(range(size)), links, network.device.ring_rank, progress)

        class Kernel:
            """Takes time and computes nothing."""

            @staticmethod
            def forward(*inputs) -> None:
                rank = network.device.ring_rank
                network.device.launch(KERNEL * ring.slowdown.get(rank, 1))

            backward = forward

        monkeypatch.setitem(KERNELS, "simulated", Kernel)
        monkeypatch.setattr(attention, "_exchange", exchange)
        monkeypatch.setattr("torch.distributed.P2POp", simulated_device.P2POp)
        monkeypatch.setattr("torch.distributed.batch_isend_irecv", network.batch_isend_irecv)
        return ring

    return make


def make_tracker(device: Device, logged=frozenset(Event), rows: int = LOG_ROWS) -> ProgressTracker:
    clock = DeviceClock(logged, device.new_event, device.host_time)
    return ProgressTracker.with_work(rows, clock)


def profile_step(device: Device, tracker: ProgressTracker, step) -> np.ndarray:
    """Run ``step`` as the training loop does; return the rows of its log."""
    tracker.begin_step()
    step()
    device.synchronize()  # the training step's own
    return tracker.end_step()


def sums_of(spent: Counter, size: int, kind: str) -> list[list[float]]:
    """Return the seconds of the simulation by direction and hop."""
    return [[spent[kind, way, hop + 1] / 1e9 for hop in range(size)] for way in Direction]


each_size = pytest.mark.parametrize("size", [2, 3, 4])
each_direction = pytest.mark.parametrize("kv_heads", [2, 1], ids=["queries travel", "keys travel"])


@each_size
@each_direction
@pytest.mark.parametrize("message", [MILLISECOND // 2, 5 * MILLISECOND], ids=["hidden", "exposed"])
@pytest.mark.parametrize("slow_rank", [None, 1])
def test_times_of_hops_and_waits_are_those_of_the_device(
    size, kv_heads, message, slow_rank, make_ring
):
    slowdown = {slow_rank: 3} if slow_rank else {}
    ring = make_ring(size, message, kv_heads=kv_heads, slowdown=slowdown)
    devices = [Device(rank) for rank in range(size)]
    trackers = [make_tracker(device) for device in devices]

    for device, rows in zip(devices, ring.run(devices, trackers, ring.profiled_step)):
        sums = sum_log(rows, size)
        compute = sums_of(device.spent, size, "kernel")
        wait = sums_of(device.spent, size, "wait")
        assert sums.compute_2R == pytest.approx(np.array(compute), abs=TOLERANCE)
        assert sums.wait_2R == pytest.approx(np.array(wait), abs=TOLERANCE)
        if message > KERNEL * slowdown.get(device.ring_rank, 1):
            assert sums.wait_2R.sum() > 0


@each_size
def test_hops_add_up_to_the_passes_of_the_device(size, make_ring):
    ring = make_ring(size)
    devices = [Device(rank) for rank in range(size)]
    trackers = [make_tracker(device) for device in devices]

    def body(device: Device, tracker: ProgressTracker) -> tuple[int, np.ndarray]:
        rows = ring.profiled_step(device, tracker)
        return device.busy_until, rows

    for busy, rows in ring.run(devices, trackers, body):
        sums = sum_log(rows, size)
        total = sums.compute_2R.sum() + sums.wait_2R.sum()
        assert total == pytest.approx(busy / 1e9, abs=TOLERANCE)


@each_size
def test_nothing_waits_but_for_messages_and_only_the_step_synchronizes(size, make_ring):
    """With and without the profile the stream waits as often, and the host never in a hop."""
    ring = make_ring(size)

    def run(make_tracker) -> list[int]:
        devices = [Device(rank) for rank in range(size)]
        ring.run(devices, [make_tracker(device) for device in devices], ring.profiled_step)
        assert all(device.synchronizations == 1 for device in devices)
        return [device.stream_waits for device in devices]

    assert run(make_tracker) == run(lambda device: ProgressTracker())


def test_reading_before_the_device_is_done_fails(make_ring):
    ring = make_ring(2)
    devices = [Device(rank) for rank in range(2)]
    trackers = [make_tracker(device) for device in devices]

    def body(device: Device, tracker: ProgressTracker) -> None:
        tracker.begin_step()
        ring.attend(tracker)
        tracker.end_step()

    with pytest.raises(simulated_device.NotComplete):
        ring.run(devices, trackers, body)


def test_marking_a_step_before_the_last_one_was_read_fails():
    device = Device()
    clock = DeviceClock(frozenset(Event), device.new_event, device.host_time)
    clock.begin()
    clock.mark()
    device.synchronize()
    with pytest.raises(simulated_device.ReusedUnread):
        clock.begin()


def test_the_simulated_device_refuses_a_wrong_order_and_events_without_a_time():
    device = Device()
    first, second = device.new_event(), device.new_event()
    first.record()
    with pytest.raises(simulated_device.NeverRecorded):
        first.elapsed_time(second)
    device.launch(MILLISECOND)
    second.record()
    with pytest.raises(simulated_device.NotComplete):
        first.elapsed_time(second)
    device.synchronize()
    with pytest.raises(simulated_device.OutOfOrder):
        second.elapsed_time(first)
    assert first.elapsed_time(second) == pytest.approx(1, rel=1e-3)


# Works of a rank's transfer: one for the message it sends, one for that it receives, and one for
# both where they use the same link, on the ranks at the end of a ring of odd size.
@pytest.mark.parametrize("size", [2, 4])
@each_direction
@pytest.mark.parametrize(
    ("logged", "per_layer"),
    [(frozenset(Event), lambda size: 14 * size - 8), (WORK_EVENTS, lambda size: 9 * size - 5)],
    ids=["profile", "stragglers alone"],
)
def test_events_are_few_and_used_again(size, kv_heads, logged, per_layer, make_ring):
    ring = make_ring(size, kv_heads=kv_heads)
    devices = [Device(rank) for rank in range(size)]
    trackers = [make_tracker(device, logged) for device in devices]
    layers, micro_batches, steps = 2, 3, 4

    def step(tracker: ProgressTracker) -> None:
        for layer in list(range(layers)) * micro_batches:
            ring.attend(tracker, layer)

    def body(device: Device, tracker: ProgressTracker) -> None:
        for _ in range(steps):
            profile_step(device, tracker, lambda: step(tracker))

    ring.run(devices, trackers, body)
    marks = layers * micro_batches * per_layer(size)
    for device in devices:
        assert len(device.events) == marks + 1, "those of one step and the anchor"
        assert device.recorded == steps * (marks + 1)


def test_nothing_is_recorded_between_steps(make_ring):
    ring = make_ring(2)
    devices = [Device(rank) for rank in range(2)]
    trackers = [make_tracker(device) for device in devices]

    def body(device: Device, tracker: ProgressTracker) -> list[int]:
        lengths = []
        for _ in range(2):
            ring.attend(tracker)  # a validation
            lengths.append(len(ring.profiled_step(device, tracker)))
        return lengths

    for first, second in ring.run(devices, trackers, body):
        assert first == second
    assert all(device.recorded == 2 * (14 * 2 - 8 + 1) for device in devices)


def test_a_full_log_takes_no_more_events(make_ring):
    ring = make_ring(2)
    devices = [Device(rank) for rank in range(2)]
    trackers = [make_tracker(device, rows=6) for device in devices]
    ring.run(devices, trackers, ring.profiled_step)
    for device, tracker in zip(devices, trackers):
        assert device.recorded == 1 + 5
        assert tracker.log.missed > 0


@pytest.mark.parametrize("size", [2, 3])
def test_a_step_of_recomputed_layers_and_micro_batches_fits_into_the_log(size, make_ring):
    """The forward pass runs twice, in the backward of its layer, and is counted twice."""
    layers, micro_batches = 2, 2
    config = Config(
        model=ModelConfig(num_layers=layers, hidden_size=32, num_attention_heads=4),
        parallel=ParallelConfig(context_parallel="striped"),
        memory=MemoryConfig(recompute="full", recompute_attention=True),
    )
    setup = RunSettings.resolve(config, world_size=size)
    rows = max_rows_per_step(setup) // setup.micro_batches * micro_batches
    ring = make_ring(size)
    devices = [Device(rank) for rank in range(size)]
    trackers = [make_tracker(device, rows=rows) for device in devices]

    def step(tracker: ProgressTracker) -> None:
        for layer in list(range(layers)) * micro_batches:
            ring.attend(tracker, layer, recompute=True)
        with tracker.in_optimizer_step():
            ring.network.device.launch(KERNEL)

    def body(device: Device, tracker: ProgressTracker) -> StepSums:
        return sum_log(profile_step(device, tracker, lambda: step(tracker)), size)

    for tracker, sums in zip(trackers, ring.run(devices, trackers, body)):
        assert tracker.log.missed == 0
        passes = layers * micro_batches
        forward, backward = sums.compute_2R.sum(axis=1)
        assert forward == pytest.approx(2 * passes * size * KERNEL / 1e9, rel=1e-2)
        assert backward == pytest.approx(passes * (size + 1) * KERNEL / 1e9, rel=1e-2)
        assert sums.optimizer_seconds == pytest.approx(KERNEL / 1e9, rel=1e-2)


@pytest.mark.parametrize("message", [MILLISECOND, 5 * MILLISECOND])
def test_the_trace_is_on_one_clock_and_every_arrow_goes_forward_in_time(message, make_ring):
    """The hosts' clocks differ by seconds, and the step begins before the device has work."""
    size = 4
    ring = make_ring(size, message, slowdown={2: 2})
    skews = [0, 3 * 10**9, -(10**9), 7 * 10**9]
    devices = [Device(rank, skew, now=10**10) for rank, skew in enumerate(skews)]
    trackers = [make_tracker(device) for device in devices]

    def body(device: Device, tracker: ProgressTracker) -> RankLog:
        began = device.host_time()
        rows = ring.profiled_step(device, tracker)
        timing = StepTime(3, began, (device.host_time() - began) / 1e9, 0.0, True)
        offset = ClockOffset(-device.clock_skew, 0)
        return RankLog(device.ring_rank, "node", offset, [StepLog(timing, rows)])

    logs = ring.run(devices, trackers, body)
    events = json.loads(as_json(logs))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    steps = {event["pid"]: event for event in slices if event["cat"] == "step"}
    assert all(abs(step["ts"]) < 100 for step in steps.values()), "all ranks begin at once"
    slack = TOLERANCE * 1e6
    for event in slices:
        step = steps[event["pid"]]
        assert step["ts"] - slack <= event["ts"]
        assert event["ts"] + event["dur"] <= step["ts"] + step["dur"] + slack
    starts = {event["id"]: event["ts"] for event in events if event["ph"] == "s"}
    ends = {event["id"]: event["ts"] for event in events if event["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == size * 3 * (size - 1)
    assert all(ends[arrow] - starts[arrow] >= message / 1e3 - slack for arrow in starts)


class ThreadConsensus:
    """The part of Consensus that monitoring uses, between ranks that are threads."""

    def __init__(self, ring: Ring, gathered: list, barrier):
        self.ranks = ring.size
        self._ring = ring
        self._gathered = gathered
        self._barrier = barrier

    @property
    def rank(self) -> int:
        return self._ring.network.device.ring_rank

    def gather(self, act) -> list:
        self._gathered[self.rank] = act()
        self._barrier.wait(timeout=60)
        everything = list(self._gathered)
        self._barrier.wait(timeout=60)
        return everything


@pytest.mark.parametrize("profiles", [True, False])
def test_the_monitor_reports_the_slow_rank_and_the_hops_of_a_run_on_cuda(
    profiles, make_ring, monkeypatch
):
    size = 2
    ring = make_ring(size, slowdown={1: 3})
    config = Config(
        model=ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4),
        parallel=ParallelConfig(context_parallel="striped"),
        logging=LoggingConfig(profile_ring=profiles, log_interval=3),
    )
    setup = replace(RunSettings.resolve(config, world_size=size), device="cuda")
    consensus = ThreadConsensus(ring, [None] * size, threading.Barrier(size))
    monkeypatch.setattr(monitor, "Consensus", SimpleNamespace(build=lambda: consensus))

    def gather(values: np.ndarray, consensus: ThreadConsensus) -> np.ndarray | None:
        everything = consensus.gather(lambda: values)
        return None if consensus.rank else np.stack(everything)

    monkeypatch.setattr(monitor, "gather_to_rank_zero", gather)
    monkeypatch.setattr(
        "megatron_ring.monitoring.ring_profile.stragglers.gather_to_rank_zero", gather
    )
    monkeypatch.setattr(
        "torch.cuda.Event", lambda enable_timing: enable_timing and ring.network.device.new_event()
    )
    devices = [Device(rank) for rank in range(size)]
    trackers = [build_progress_tracker(setup) for _ in devices]

    def body(device: Device, tracker: ProgressTracker) -> list[RingReport]:
        watch = RingMonitor(setup, tracker)
        reports = []
        for step in range(1, 4):
            watch.begin()
            began = device.now
            for layer in (0, 1):
                ring.attend(tracker, layer)
            device.synchronize()
            reports.append(watch.end(step, (device.now - began) / 1e9, 0.0))
        return reports

    first, second, third = ring.run(devices, trackers, body)[0]
    assert third.metrics["slowest_rank"] == 1
    assert third.metrics["slowest_over_mean"] == pytest.approx(3 / 2, rel=1e-2)
    assert any(line.startswith("straggler        rank 1") for line in third.lines)
    assert "slowest_rank" not in second.metrics
    assert ("ring_hops" in first.metrics) == profiles
    if profiles:
        hops = {(hop["direction"], hop["hop"]): hop for hop in third.metrics["ring_hops"]}
        # Two layers; rank 1 takes three times as long as rank 0.
        assert hops["forward", 1]["compute_seconds"] == pytest.approx(
            2 * 2 * KERNEL / 1e9, rel=0.01
        )
        assert hops["forward", 1]["imbalance"] == pytest.approx(3 / 2, rel=1e-2)
