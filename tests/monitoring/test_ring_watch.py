"""When a ring is watched: what asks for it, what is refused, and what is said where it cannot be."""

from dataclasses import replace

import pytest

from megatron_ring.config import Config, LoggingConfig, ModelConfig, ParallelConfig
from megatron_ring.monitoring.ring_profile.watch import in_words, progress_tracker
from megatron_ring.parallel.grid import Grid
from megatron_ring.settings import rules
from megatron_ring.settings.setup import Setup

CONFIG = Config(
    model=ModelConfig(hidden_size=32, num_attention_heads=4),
    parallel=ParallelConfig(context_parallel="striped"),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"straggler_threshold": 0.9}, "straggler_threshold 0.9 must be above 1, the mean, or 0"),
        ({"profile_ring_steps": 0}, "profile_ring_steps 0 must be at least 1"),
        (
            {"profile_ring_trace": "x.json"},
            "profile_ring_trace x.json has no effect without profile_ring",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(changes, message):
    assert message in LoggingConfig(**changes).problems()[0]


def test_a_device_that_waits_by_itself_is_not_profiled():
    profiled = replace(CONFIG, logging=LoggingConfig(profile_ring=True))
    told = [
        [m for m in rules.problems(profiled, Grid(), device) if "profile_ring" in m]
        for device in ("cpu", "cuda")
    ]
    assert told[0] == []
    assert "CUDA, the device waits for transfers and not the host" in told[1][0]


def test_where_the_host_does_not_wait_stragglers_are_not_looked_for_and_that_is_said():
    here = Setup.of(CONFIG, world_size=2)
    there, not_wanted = (
        replace(here, device="cuda"),
        replace(CONFIG, logging=LoggingConfig(straggler_threshold=0)),
    )
    assert progress_tracker(here).adds_work_up
    assert not progress_tracker(there).adds_work_up
    assert in_words(here) == in_words(replace(there, config=not_wanted)) == []
    assert in_words(there)[0].startswith("stragglers       not looked for: on CUDA")


@pytest.mark.parametrize(("ring", "threshold"), [(1, 1.25), (2, 0)])
def test_nobody_looks_where_there_is_no_ring_or_no_threshold(ring, threshold):
    setup = Setup.of(
        replace(CONFIG, logging=LoggingConfig(straggler_threshold=threshold)), world_size=ring
    )
    assert progress_tracker(setup).log is None
    assert not progress_tracker(setup).adds_work_up
