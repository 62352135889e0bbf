"""Which options turn on ring profiling, which are refused, and what is reported without it."""

from dataclasses import replace

import pytest

from megatron_ring.config import Config, LoggingConfig, ModelConfig, ParallelConfig
from megatron_ring.monitoring.ring_profile.monitor import build_progress_tracker, straggler_notice
from megatron_ring.parallel.grid import Grid
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


def test_profiling_is_refused_on_cuda():
    profiled = replace(CONFIG, logging=LoggingConfig(profile_ring=True))

    def problems(device: str) -> list[str]:
        messages = rules.problems(profiled, Grid(), device)
        return [message for message in messages if "profile_ring" in message]

    assert problems("cpu") == []
    [problem] = problems("cuda")
    assert "CUDA" in problem
    assert "--profile-ring" in problem


def test_stragglers_are_not_detected_on_cuda_and_the_console_reports_that():
    on_cpu = RunSettings.resolve(CONFIG, world_size=2)
    on_cuda = replace(on_cpu, device="cuda")
    disabled = replace(CONFIG, logging=LoggingConfig(straggler_threshold=0))
    assert build_progress_tracker(on_cpu).accumulates_work
    assert not build_progress_tracker(on_cuda).accumulates_work
    assert straggler_notice(on_cpu) == []
    assert straggler_notice(replace(on_cuda, config=disabled)) == []
    [line] = straggler_notice(on_cuda)
    assert line.startswith("stragglers       not detected")


@pytest.mark.parametrize(("ring", "threshold"), [(1, 1.25), (2, 0)])
def test_without_a_ring_or_a_threshold_nothing_is_recorded(ring, threshold):
    config = replace(CONFIG, logging=LoggingConfig(straggler_threshold=threshold))
    setup = RunSettings.resolve(config, world_size=ring)
    assert build_progress_tracker(setup).log is None
    assert not build_progress_tracker(setup).accumulates_work
