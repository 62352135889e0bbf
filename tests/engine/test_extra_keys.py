"""Keys of the config's deepspeed that the installed DeepSpeed rejects or ignores are refused."""

from dataclasses import replace

import deepspeed
import pytest
import torch.distributed as dist

from megatron_ring.engine.extra_keys import rejected_settings_as_config_error, resolve_settings
from megatron_ring.errors import ConfigError
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.environment import Environment
from megatron_ring.preflight.self_test import run_self_test_only
from megatron_ring.settings.run_settings import RunSettings
from megatron_ring.training.start import Start
from pretrain_gpt import main
from tests.distributed import run_ranks
from tests.training import tiny

# Extra keys that DeepSpeed reads: in scalars, in sections that it reads key by key or as a whole,
# in sections that pydantic validates, and below a section.
ACCEPTED = {
    "wall_clock_breakdown": False,
    "steps_per_print": 5,
    "dump_state": False,
    "data_types": {"grad_accum_dtype": "fp32"},
    "flops_profiler": {"enabled": False, "profile_step": 2},
    "pipeline": {"use_reentrant": True},
    "comms_logger": {"enabled": False, "prof_ops": ["all_reduce"]},
    "comet": {"enabled": False},
    "autotuning": {"enabled": False, "arg_mappings": {"any": "name"}},
    "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 1000},
}


def problems(**extra) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        resolve_settings(tiny.config(training={"deepspeed": extra}), 4)
    return raised.value.problems


def test_keys_that_deepspeed_reads_are_accepted_and_change_nothing_else():
    config = tiny.config(training={"zero_stage": 2, "deepspeed": ACCEPTED})
    settings = resolve_settings(config, 4).deepspeed
    assert settings == RunSettings.resolve(config, 4).deepspeed
    assert settings["zero_optimization"] == {"stage": 2} | ACCEPTED["zero_optimization"]


def test_every_key_that_deepspeed_would_ignore_is_refused_with_the_nearest_ones():
    found = problems(
        zero_optimisation={"overlap_comm": True},
        flops_profiler={"enabled": True, "profile_stp": 1},
        qqqq=1,
        **{key: ACCEPTED[key] for key in ("dump_state", "pipeline")},
    )
    unlike, misspelt, nested = found
    assert "'qqqq'" in unlike
    assert "Nearest" not in unlike
    assert "'zero_optimisation'" in misspelt
    assert "Nearest: zero_optimization" in misspelt
    assert "'flops_profiler.profile_stp'" in nested
    assert "Nearest: flops_profiler.profile_step" in nested
    assert all(deepspeed.__version__ in problem for problem in found)
    assert all("deepspeed of section training (YAML" in problem for problem in found)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("checkpoint", 3, "'int'"),
        ("checkpoint", {"tag_validation": "often"}, "OFTEN"),
        ("nebula", {}, "removed"),
    ],
)
def test_a_key_that_deepspeed_rejects_in_its_own_way_is_named(key, value, reason):
    [problem] = problems(**{key: value}, dump_state=False)
    assert problem.startswith(f"deepspeed: {key} is rejected")
    assert reason in problem


def test_keys_that_pydantic_rejects_are_one_error():
    config = {"train_batch_size": 1, "zero_optimization": {"stage": 1, "no_such_key": 1}}
    with pytest.raises(ConfigError) as raised, rejected_settings_as_config_error():
        deepspeed.DeepSpeedConfig(config)
    [problem] = raised.value.problems
    assert problem.startswith("deepspeed: no_such_key 1 ")
    with pytest.raises(ValueError, match="other"), rejected_settings_as_config_error():
        raise ValueError("other")


MISSPELT = tiny.config(training={"deepspeed": {"zero_optimisation": {}}})


def test_the_plan_checks_extra_keys():
    with pytest.raises(ConfigError, match="Nearest: zero_optimization"):
        main(replace(MISSPELT, dry_run=True), Environment.read(), stopping=None)


def start_of_run(rank: int, world_size: int, starts) -> None:
    with pytest.raises(ConfigError, match="Nearest: zero_optimization"):
        starts(MISSPELT, Environment.read(), Consensus.build())
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=rank, world_size=world_size)


@pytest.mark.parametrize("starts", [Start.build, run_self_test_only])
def test_the_start_of_a_run_checks_extra_keys(starts):
    run_ranks(1, start_of_run, starts)
