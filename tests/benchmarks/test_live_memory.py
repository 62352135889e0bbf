"""LiveMemory counts the storage that operators allocate, and only while it is alive."""

import torch

from benchmarks.live_memory import LiveMemory


def test_only_new_and_unfreed_storage_counts():
    given = torch.ones(100)
    with LiveMemory() as live:
        view, made = given.view(10, 10), given + 1
        assert live.alive() == 400
        made.mul_(2)
        assert live.alive() == 400
        del made
        assert live.alive() == 0
        view @ view
    assert (live.alive(), live.peak) == (0, 400)
