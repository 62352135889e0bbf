"""Recompute under ZeRO: a recomputed block has its parameters, and reduces gradients only once.

By default ZeRO 3 does not partition parameters of fewer than 100,000 elements, which would be all
of them here.
"""

from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.training import tiny

STEPS = 2
PARTITIONED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
MODES = {
    "none": {},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "full with attention": {"recompute": "full", "recompute_attention": True},
}
KINDS = {
    "Llama": {},
    # With biases, which DeepSpeed's linear layer adds in place.
    "GPT-2": {"normalization": "LayerNorm", "activation": "gelu", "add_bias_linear": True},
}
CASES = [("Llama", 2, 1), *((kind, 3, chunks) for kind in KINDS for chunks in (1, 3))]


def train_all(rank: int, world_size: int, prefix: Path) -> dict[tuple, list[tuple[float, float]]]:
    """Return losses and gradient norms by case and mode."""
    return {
        (case, mode): train(tiny.Run(config(*case, mode), prefix, rank, world_size))
        for case in CASES
        for mode in MODES
    }


def train(run: tiny.Run) -> list[tuple[float, float]]:
    assert not any(
        getattr(parameter, "ds_persist", False)
        for parameter in run.engine.engine.module.parameters()
    )
    return run.steps(STEPS)


def config(kind: str, stage: int, chunks: int, mode: str):
    training = {
        "zero_stage": stage,
        "deepspeed": {"zero_optimization": PARTITIONED} if stage == 3 else {},
    }
    return tiny.config(
        model=KINDS[kind], training=training, memory={**MODES[mode], "mlp_chunks": chunks}
    )


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[tuple, list[tuple[float, float]]]:
    prefix = tiny.write_store(tmp_path_factory.mktemp("store"))
    return run_ranks(2, train_all, prefix)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_recompute_does_not_change_a_bit(case, mode, steps):
    assert steps[case, mode] == steps[case, "none"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mlp_chunks_change_steps_only_by_rounding(case, steps):
    kind, stage, _ = case
    for step, whole in zip(steps[case, "none"], steps[(kind, stage, 1), "none"]):
        assert step == pytest.approx(whole, rel=1e-5)
