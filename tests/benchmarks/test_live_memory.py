"""The counters of live memory: by operator, and by the allocator."""

import pytest
import torch

from benchmarks.live_memory import LiveBytes, LiveMemory


def test_only_new_and_unfreed_storage_counts():
    given = torch.ones(100)
    with LiveMemory() as live:
        view = given.view(10, 10)
        made = given + 1
        assert live.alive() == 400
        made.mul_(2)
        assert live.alive() == 400
        del made
        assert live.alive() == 0
        view @ view
    assert (live.alive(), live.peak) == (0, 400)


def test_live_bytes_are_counted_within_operators_and_between_them():
    with LiveBytes() as live:
        kept = torch.ones(1000)
        torch.ones(500)
        _ = kept.sort()[0][:10].clone()  # the sorted values and indices are freed at the end
    assert live.after == pytest.approx(4000, abs=256)
    assert live.peak >= 4000 + 4000 + 8000


def test_a_forgotten_peak_restarts_from_what_is_still_alive():
    with LiveBytes() as live:
        kept = torch.ones(1000)
        torch.ones(50_000)
        live.forget_peak()
        kept + 1
    assert live.peak == pytest.approx(8000, abs=256)
