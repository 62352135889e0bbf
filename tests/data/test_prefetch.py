"""Prefetch: the loader's steps in its order, what counts as consumed, faults that arrive, and a thread that ends."""

import threading
import time

import pytest
import torch

from megatron_ring.data.prefetch import Prefetcher
from megatron_ring.errors import DataError


class Counting:
    """A loader whose steps are their numbers; it fails at step ``fails_at``."""

    def __init__(self, consumed_samples: int = 0, fails_at: int = -1):
        self.consumed_samples, self.fails_at, self.steps = consumed_samples, fails_at, 0

    def next_step(self) -> list[torch.Tensor]:
        if self.steps == self.fails_at:
            raise DataError("the store ends here")
        self.steps += 1
        self.consumed_samples += 4
        return [torch.tensor(self.steps)]


def settled(loader: Counting) -> int:
    """The steps prepared once nothing more happens."""
    seen = -1
    while seen != loader.steps:
        seen = loader.steps
        time.sleep(0.05)
    return seen


def test_steps_come_in_order_and_only_those_handed_out_are_consumed():
    loader = Counting(consumed_samples=100)
    with Prefetcher(loader) as ahead:
        assert ahead.consumed_samples == 100
        for step in range(1, 6):
            assert ahead.next_step() == [step]
            assert ahead.consumed_samples == 100 + 4 * step


def test_two_steps_are_ready_and_no_more():
    loader = Counting()
    with Prefetcher(loader) as ahead:
        assert settled(loader) == 2
        ahead.next_step()
        assert settled(loader) == 3
        assert ahead.consumed_samples == 4


def test_a_fault_arrives_in_its_place_and_again_for_who_asks_again():
    with Prefetcher(Counting(fails_at=1)) as ahead:
        assert ahead.next_step() == [1]
        for _ in range(2):
            with pytest.raises(DataError, match="the store ends here"):
                ahead.next_step()
        assert ahead.consumed_samples == 4


@pytest.mark.parametrize("fails_at", [-1, 0])
def test_leaving_ends_the_thread_though_steps_lie_ready(fails_at):
    loader, before = Counting(fails_at=fails_at), threading.active_count()
    with Prefetcher(loader):
        settled(loader)
    assert threading.active_count() == before


def test_a_fault_of_the_step_itself_ends_the_thread_too():
    before = threading.active_count()
    with pytest.raises(KeyError), Prefetcher(Counting()):
        raise KeyError
    assert threading.active_count() == before
