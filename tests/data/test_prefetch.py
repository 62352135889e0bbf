"""Prefetch: steps in order, consumed samples, errors of the loader, and a thread that ends."""

import threading
import time

import pytest
import torch

from megatron_ring.data.prefetch import Prefetcher
from megatron_ring.errors import DataError


class CountingLoader:
    """A loader whose steps are their numbers; it fails at step ``fails_at``."""

    def __init__(self, consumed_samples: int = 0, fails_at: int = -1):
        self.consumed_samples = consumed_samples
        self.fails_at = fails_at
        self.steps = 0

    def next_step(self) -> list[torch.Tensor]:
        if self.steps == self.fails_at:
            raise DataError("the store ends here")
        self.steps += 1
        self.consumed_samples += 4
        return [torch.tensor(self.steps)]


def steps_when_idle(loader: CountingLoader) -> int:
    """Wait until the thread prepares nothing more, and return the steps prepared by then."""
    steps = -1
    while steps != loader.steps:
        steps = loader.steps
        time.sleep(0.05)
    return steps


def test_steps_come_in_order_and_count_as_consumed_when_returned():
    loader = CountingLoader(consumed_samples=100)
    with Prefetcher(loader) as ahead:
        assert ahead.consumed_samples == 100
        for step in range(1, 6):
            assert ahead.next_step() == [step]
            assert ahead.consumed_samples == 100 + 4 * step


def test_at_most_two_steps_are_prepared_ahead():
    loader = CountingLoader()
    with Prefetcher(loader) as ahead:
        assert steps_when_idle(loader) == 2
        ahead.next_step()
        assert steps_when_idle(loader) == 3
        assert ahead.consumed_samples == 4


def test_an_error_of_the_loader_is_raised_at_its_step_and_at_every_later_call():
    with Prefetcher(CountingLoader(fails_at=1)) as ahead:
        assert ahead.next_step() == [1]
        for _ in range(2):
            with pytest.raises(DataError, match="the store ends here"):
                ahead.next_step()
        assert ahead.consumed_samples == 4


@pytest.mark.parametrize("fails_at", [-1, 0])
def test_the_thread_ends_with_the_block_although_steps_are_ready(fails_at):
    loader = CountingLoader(fails_at=fails_at)
    threads_before = threading.active_count()
    with Prefetcher(loader):
        steps_when_idle(loader)
    assert threading.active_count() == threads_before


def test_the_thread_ends_when_an_error_leaves_the_block():
    threads_before = threading.active_count()
    with pytest.raises(KeyError), Prefetcher(CountingLoader()):
        raise KeyError
    assert threading.active_count() == threads_before
