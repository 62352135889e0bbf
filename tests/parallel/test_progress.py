"""What is noted of a process while its layers run, are run again and are differentiated."""

import pytest
import torch

from megatron_ring.config import MemoryConfig, ModelConfig
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.kernels.attention import KERNELS, reference
from megatron_ring.model.gpt import Layers
from megatron_ring.model.initialization import build
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.progress import NO_RANK, Direction, Place, ProgressTracker, Work
from megatron_ring.parallel.ring_log import Event

MODEL = ModelConfig(num_layers=6, hidden_size=16, num_attention_heads=2)
STAGE = range(2, 4)  # the layers of a pipeline's second stage
LENGTH = 8

FORWARD = [(7, 2, Direction.FORWARD, 1, 1), (7, 3, Direction.FORWARD, 1, 1)]
BACKWARD = [(7, 3, Direction.BACKWARD, 1, 1), (7, 2, Direction.BACKWARD, 1, 1)]
AGAIN = [FORWARD[1], BACKWARD[0], FORWARD[0], BACKWARD[1]]


class Noting:
    """The reference kernel, with a list of the places where it was called."""

    def __init__(self, place: ProgressTracker):
        self.place, self.places = place, []

    def forward(self, *inputs) -> None:
        self.places.append(self.place.read()[:5])
        reference.forward(*inputs)

    def backward(self, *inputs) -> None:
        self.places.append(self.place.read()[:5])
        reference.backward(*inputs)


@pytest.mark.parametrize(
    ("memory", "backward"),
    [
        (MemoryConfig(), BACKWARD),
        (MemoryConfig(recompute="selective"), BACKWARD),
        (MemoryConfig(recompute="full"), BACKWARD),
        (MemoryConfig(recompute="full", recompute_attention=True), AGAIN),
    ],
    ids=["kept", "selective", "full", "attention too"],
)
def test_a_stages_layers_have_their_numbers_in_the_whole_model_both_ways(
    memory, backward, monkeypatch
):
    place = ProgressTracker()
    kernel = Noting(place)
    monkeypatch.setitem(KERNELS, "noting", kernel)
    attention = ContextParallelAttention(
        Layout("striped", LENGTH, 1), "noting", ProcessGroups(), place
    )
    layers = build(Layers, MODEL, LENGTH, attention, seed=1, memory=memory, layers=STAGE)
    place.follow(layers)
    for _ in place.steps([7]):
        x_BlE = torch.randn(1, LENGTH, MODEL.hidden_size, requires_grad=True)
        layers.run(x_BlE, torch.arange(LENGTH), None).sum().backward()
    assert kernel.places == FORWARD + backward
    assert place.read().hops == 0, "outside of the ring again"


def test_a_wait_is_noted_until_it_is_over():
    place = ProgressTracker()
    with place.in_ring(5, Direction.BACKWARD):
        place.begin_hop(1, 4)
        with place.waiting_for(2):
            assert place.read()._replace(seconds=0) == Place(
                0, 5, Direction.BACKWARD, 2, 4, 0, waits_for=2
            )
        assert place.read().waits_for == NO_RANK
    assert place.read().hops == 0


def test_a_wait_that_fails_is_still_told():
    place = ProgressTracker()

    def lose() -> None:
        with place.in_ring(5, Direction.FORWARD), place.waiting_for(2):
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError):
        lose()
    assert place.read().waits_for == 2


def test_seconds_begin_anew_with_every_hop_and_every_wait():
    place = ProgressTracker()
    place.begin_hop(0, 2)
    place.numbers[Place._fields.index("seconds")] -= 10**10
    assert 10 <= place.read().seconds < 20
    with place.waiting_for(0):
        assert place.read().seconds < 10


def test_what_an_operator_notes_is_read_outside_of_it():
    place = ProgressTracker()
    ProgressTracker(place.numbers).begin_hop(2, 3)
    assert place.read().hop == 3


def test_work_is_a_pass_but_for_its_waits(monkeypatch):
    moments = iter(range(100, 200, 10))
    place = ProgressTracker.with_work()
    monkeypatch.setattr("time.monotonic_ns", lambda: next(moments))
    with place.in_ring(0, Direction.FORWARD):  # at 100
        place.begin_hop(0, 1)
        with place.waiting_for(1):  # from 120 to 130
            pass
    place.multiplies(7)
    assert place.work == Work(nanoseconds=140 - 100 - 10, products=7)


def test_everything_that_is_noted_is_in_the_log(monkeypatch):
    moments = iter(range(100, 200, 10))
    place = ProgressTracker.with_work(log_rows=9)
    monkeypatch.setattr("time.monotonic_ns", lambda: next(moments))
    with place.in_ring(5, Direction.BACKWARD):
        place.begin_hop(1, 4)
        sent_at = place.sends(1000, receiver=3)
        with place.waiting_for(2):
            pass
        place.received(sent_at, sender=2)
    with place.optimizing():
        pass
    assert place.log.rows.tolist() == [
        [100, Event.ENTERED, 5, Direction.BACKWARD],
        [110, Event.HOP, 2, 4],
        [120, Event.SENT, 1000, 3],
        [130, Event.WAITING, 2, 0],
        [140, Event.WAITED, 0, 0],
        [150, Event.RECEIVED, 120, 2],
        [160, Event.LEFT, 0, 0],
        [170, Event.OPTIMIZING, 0, 0],
        [180, Event.OPTIMIZED, 0, 0],
    ]


def test_what_does_not_fit_into_the_log_is_counted():
    place = ProgressTracker.with_work(log_rows=2)
    for hop in range(3):
        place.begin_hop(hop, 3)
    assert place.log.rows[:, 2].tolist() == [1, 2]
    assert place.log.missed == 1
    place.log.clear()
    assert len(place.log.rows) == place.log.missed == 0


def test_an_operator_notes_in_the_same_log():
    place = ProgressTracker.with_work(log_rows=1)
    ProgressTracker(place.numbers).begin_hop(2, 3)
    assert place.log.rows[0, 1:].tolist() == [Event.HOP, 3, 3]


def test_without_room_only_the_place_is_kept():
    place = ProgressTracker()
    with place.in_ring(1, Direction.FORWARD):
        place.multiplies(3)
    assert place.log is None
    assert not place.adds_work_up
    assert len(place.numbers) == len(Place._fields)
