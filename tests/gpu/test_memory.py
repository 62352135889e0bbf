"""The planner's peak memory is within its error of the allocator's, for models that fill memory.

On a CPU a small model runs through the same code; tests/benchmarks/test_measure_memory.py and
tests/plan/test_memory.py have more cases.
"""

from dataclasses import replace

import pytest

from benchmarks.measure_memory import SMALL, live_peak
from megatron_ring.config import Config, DataConfig, MemoryConfig, ModelConfig, TrainingConfig
from megatron_ring.plan.memory import ERROR
from megatron_ring.plan.memory_report import memory_of_stages
from megatron_ring.settings.run_settings import RunSettings
from tests.distributed import run_ranks
from tests.gpu.devices import each_device, skip_without
from tests.training import tiny

VOCAB = 4096
LARGE = Config(
    model=ModelConfig(num_layers=8, hidden_size=1024, num_attention_heads=8),
    data=DataConfig(seq_length=16384),
    training=TrainingConfig(train_iters=10, lr_warmup_iters=0, dtype="bf16"),
)


def case(training: dict | None = None, **memory) -> Config:
    return replace(
        LARGE,
        training=replace(LARGE.training, **(training or {})),
        memory=MemoryConfig(**memory),
    )


CASES = {
    "cuda": {
        "ZeRO 0": case({"zero_stage": 0}),
        "ZeRO 1": case(),
        "ZeRO 2, selective": case({"zero_stage": 2}, recompute="selective"),
        "ZeRO 3, full": case({"zero_stage": 3}, recompute="full"),
        "full with attention, chunks": case(
            recompute="full", recompute_attention=True, mlp_chunks=4
        ),
        "activation offload": case(offload_activations=True),
        "optimizer offload": case({"zero_stage": 2}, offload_optimizer="cpu"),
        "torch's operations": case({"fused_operations": "torch"}),
        "fp32": case({"dtype": "fp32"}, recompute="selective"),
    },
    "cpu": {"a small model": replace(SMALL, data=DataConfig(seq_length=1024))},
}


def planned_and_measured(
    rank: int, world_size: int, cases: dict[str, Config]
) -> dict[str, tuple[int, int]]:
    """Return the planned and the measured peak bytes of each case, all in this process."""
    tiny.start_rank(rank, world_size)
    found = {}
    for name, config in cases.items():
        setup = RunSettings.resolve(config, world_size)
        (stage,) = memory_of_stages(setup, VOCAB)
        found[name] = stage.peak, live_peak(setup, rank, VOCAB)
    return found


@each_device
def test_the_planned_peak_is_near_the_measured_one(device):
    skip_without(device)
    (found,) = run_ranks(1, planned_and_measured, CASES[device], device=device)
    # On a CPU the figure scatters; see tests/benchmarks/test_measure_memory.py.
    limit = ERROR if device == "cuda" else 2 * ERROR
    wrong = {
        name: (planned, measured)
        for name, (planned, measured) in found.items()
        if planned != pytest.approx(measured, rel=limit)
    }
    assert found
    assert wrong == {}
