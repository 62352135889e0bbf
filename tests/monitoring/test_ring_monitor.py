"""Which options turn on ring profiling, which are refused, and what times it on each device."""

from dataclasses import replace

import pytest

from megatron_ring.config import Config, LoggingConfig, ModelConfig, ParallelConfig
from megatron_ring.monitoring.ring_profile.monitor import build_progress_tracker
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.ring_log import WORK_EVENTS, Event
from megatron_ring.settings import rules
from megatron_ring.settings.run_settings import RunSettings

CONFIG = Config(
    model=ModelConfig(hidden_size=32, num_attention_heads=4),
    parallel=ParallelConfig(context_parallel="striped"),
)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"straggler_threshold": 0.9},
            ["straggler_threshold 0.9", "above 1", "--straggler-threshold"],
        ),
        ({"profile_ring_steps": 0}, ["profile_ring_steps 0", "at least 1", "--profile-ring-steps"]),
        ({"profile_ring_trace": "x.json"}, ["profile_ring_trace x.json", "Set --profile-ring"]),
    ],
)
def test_options_without_effect_are_refused(changes, parts):
    [problem] = LoggingConfig(**changes).problems()
    assert all(part in problem for part in parts)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_profiling_is_allowed_on_every_device(device):
    profiled = replace(CONFIG, logging=LoggingConfig(profile_ring=True))
    assert not any(
        "profile_ring" in message for message in rules.problems(profiled, Grid(), device)
    )


def test_the_host_times_a_cpu_and_events_time_a_cuda_device():
    on_cpu = RunSettings.resolve(CONFIG, world_size=2)
    on_cuda = replace(on_cpu, device="cuda")
    profiled = replace(on_cuda, config=replace(CONFIG, logging=LoggingConfig(profile_ring=True)))
    assert build_progress_tracker(on_cpu).clock is None
    stragglers_only = build_progress_tracker(on_cuda)
    assert stragglers_only.accumulates_work
    assert set(stragglers_only.clock.logged) == WORK_EVENTS
    assert set(build_progress_tracker(profiled).clock.logged) == set(Event)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("ring", "threshold"), [(1, 1.25), (2, 0)])
def test_without_a_ring_or_a_threshold_nothing_is_recorded(ring, threshold, device):
    config = replace(CONFIG, logging=LoggingConfig(straggler_threshold=threshold))
    setup = replace(RunSettings.resolve(config, world_size=ring), device=device)
    tracker = build_progress_tracker(setup)
    assert tracker.log is None
    assert tracker.clock is None
    assert not tracker.accumulates_work
