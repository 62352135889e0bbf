"""The progress that is recorded while layers run, are recomputed and run backward."""

import pytest
import torch

from megatron_ring.config import MemoryConfig, ModelConfig
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.kernels.attention import KERNELS, reference
from megatron_ring.model.gpt import Layers
from megatron_ring.model.initialization import build
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.progress import (
    NO_RANK,
    Direction,
    ProgressSnapshot,
    ProgressTracker,
    RingWork,
)
from megatron_ring.parallel.ring_log import Event

MODEL = ModelConfig(num_layers=6, hidden_size=16, num_attention_heads=2)
STAGE = range(2, 4)  # the layers of the second pipeline stage
LENGTH = 8

FORWARD = [(7, 2, Direction.FORWARD, 1, 1), (7, 3, Direction.FORWARD, 1, 1)]
BACKWARD = [(7, 3, Direction.BACKWARD, 1, 1), (7, 2, Direction.BACKWARD, 1, 1)]
RECOMPUTED_BACKWARD = [FORWARD[1], BACKWARD[0], FORWARD[0], BACKWARD[1]]


class ProgressRecordingKernel:
    """The reference kernel; records the progress at which it was called."""

    def __init__(self, progress: ProgressTracker):
        self.progress = progress
        self.calls = []

    def forward(self, *inputs) -> None:
        self.calls.append(self.progress.read()[:5])
        reference.forward(*inputs)

    def backward(self, *inputs) -> None:
        self.calls.append(self.progress.read()[:5])
        reference.backward(*inputs)


@pytest.mark.parametrize(
    ("memory", "backward"),
    [
        (MemoryConfig(), BACKWARD),
        (MemoryConfig(recompute="selective"), BACKWARD),
        (MemoryConfig(recompute="full"), BACKWARD),
        (MemoryConfig(recompute="full", recompute_attention=True), RECOMPUTED_BACKWARD),
    ],
    ids=["no recompute", "selective", "full", "attention too"],
)
def test_layers_of_a_stage_are_recorded_with_their_index_in_the_whole_model(
    memory, backward, monkeypatch
):
    progress = ProgressTracker()
    kernel = ProgressRecordingKernel(progress)
    monkeypatch.setitem(KERNELS, "recording", kernel)
    attention = ContextParallelAttention(
        Layout("striped", LENGTH, 1), "recording", ProcessGroups(), progress
    )
    layers = build(Layers, MODEL, LENGTH, attention, seed=1, memory=memory, layers=STAGE)
    progress.track_layers(layers)
    for _ in progress.track_steps([7]):
        x_BlE = torch.randn(1, LENGTH, MODEL.hidden_size, requires_grad=True)
        layers.run(x_BlE, torch.arange(LENGTH), None).sum().backward()
    assert kernel.calls == FORWARD + backward
    assert progress.read().hops == 0, "the process has left the ring"


def test_a_wait_is_recorded_until_it_ends():
    progress = ProgressTracker()
    with progress.in_ring(5, Direction.BACKWARD):
        progress.begin_hop(1, 4, source=2)
        with progress.waiting_for(2):
            waiting = progress.read()._replace(seconds=0)
            assert waiting == ProgressSnapshot(0, 5, Direction.BACKWARD, 2, 4, 0, waits_for=2)
        assert progress.read().waits_for == NO_RANK
    assert progress.read().hops == 0


def test_a_wait_that_raises_stays_recorded():
    progress = ProgressTracker()

    def lose_connection() -> None:
        with progress.in_ring(5, Direction.FORWARD), progress.waiting_for(2):
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError):
        lose_connection()
    assert progress.read().waits_for == 2


def test_seconds_restart_with_every_hop_and_every_wait():
    progress = ProgressTracker()
    progress.begin_hop(0, 2, source=0)
    progress.buffer[ProgressSnapshot._fields.index("seconds")] -= 10**10
    assert 10 <= progress.read().seconds < 20
    with progress.waiting_for(0):
        assert progress.read().seconds < 10


def test_trackers_of_one_buffer_share_their_progress():
    progress = ProgressTracker()
    ProgressTracker(progress.buffer).begin_hop(2, 3, source=1)
    assert progress.read().hop == 3


def test_work_is_the_time_of_a_pass_without_its_waits(monkeypatch):
    moments = iter(range(100, 200, 10))
    progress = ProgressTracker.with_work()
    monkeypatch.setattr("time.monotonic_ns", lambda: next(moments))
    with progress.in_ring(0, Direction.FORWARD):  # at 100
        progress.begin_hop(0, 1, source=0)
        with progress.waiting_for(1):  # from 130 to 140
            pass
    progress.add_products(7)
    assert progress.work == RingWork(nanoseconds=150 - 100 - 10, products=7)


def test_all_events_are_logged(monkeypatch):
    moments = iter(range(100, 200, 10))
    progress = ProgressTracker.with_work(log_rows=10)
    monkeypatch.setattr("time.monotonic_ns", lambda: next(moments))
    with progress.in_ring(5, Direction.BACKWARD):
        progress.begin_hop(1, 4, source=2)
        send_row = progress.record_send(1000, receiver=3)
        with progress.waiting_for(2):
            pass
        progress.record_receive(send_row, sender=2)
    with progress.in_optimizer_step():
        pass
    assert progress.log.rows.tolist() == [
        [100, Event.ENTERED, 5, Direction.BACKWARD],
        [110, Event.HOP, 2, 4],
        [120, Event.SOURCE, 2, 0],
        [130, Event.SENT, 1000, 3],
        [140, Event.WAITING, 2, 0],
        [150, Event.WAITED, 0, 0],
        [160, Event.RECEIVED, 3, 2],
        [170, Event.LEFT, 0, 0],
        [180, Event.OPTIMIZING, 0, 0],
        [190, Event.OPTIMIZED, 0, 0],
    ]


def test_rows_that_do_not_fit_into_the_log_are_counted():
    progress = ProgressTracker.with_work(log_rows=4)
    for hop in range(3):
        progress.begin_hop(hop, 3, source=hop)
    assert progress.log.rows[:, 2].tolist() == [1, 0, 2, 1]
    assert progress.log.missed == 2
    progress.log.clear()
    assert len(progress.log.rows) == progress.log.missed == 0


def test_trackers_of_one_buffer_share_their_log():
    progress = ProgressTracker.with_work(log_rows=1)
    ProgressTracker(progress.buffer).begin_hop(2, 3, source=1)
    assert progress.log.rows[0, 1:].tolist() == [Event.HOP, 3, 3]


def test_a_small_buffer_keeps_progress_without_work_and_log():
    progress = ProgressTracker()
    with progress.in_ring(1, Direction.FORWARD):
        progress.add_products(3)
    assert progress.log is None
    assert not progress.accumulates_work
    assert len(progress.buffer) == len(ProgressSnapshot._fields)
