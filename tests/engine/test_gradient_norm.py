"""The gradient's norm without ZeRO in fp32, where it is ours to take: each parameter once, clipped or not."""

import pytest
import torch

from megatron_ring.engine.gradient_norm import clip
from megatron_ring.parallel.collectives import ProcessGroups
from tests.distributed import run_ranks
from tests.training import tiny


def parameter(gradient: list[float], **marks: object) -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.zeros(len(gradient)))
    made.grad = torch.tensor(gradient)
    for name, value in marks.items():
        setattr(made, name, value)
    return made


def test_gradients_beyond_the_largest_norm_are_scaled_down_to_it():
    parameters = [parameter([3.0]), parameter([0.0, 4.0]), torch.nn.Parameter(torch.zeros(1))]
    assert clip(parameters, 10.0, ProcessGroups()) == pytest.approx(5.0)
    assert parameters[0].grad.item() == 3.0
    assert clip(parameters, 1.0, ProcessGroups()) == pytest.approx(5.0)
    torch.testing.assert_close(
        torch.cat([parameters[0].grad, parameters[1].grad]), torch.tensor([0.6, 0.0, 0.8])
    )


def test_a_tied_copy_on_a_later_stage_is_clipped_and_not_counted():
    first, copy = parameter([3.0]), parameter([4.0], ds_pipe_replicated=True)
    assert clip([first, copy], 1.5, ProcessGroups()) == pytest.approx(3.0)
    torch.testing.assert_close(copy.grad, torch.tensor([2.0]))


def unclipped(rank: int, world_size: int, prefix, parallel: dict) -> list[list[float]]:
    runs = [
        tiny.Run(
            tiny.config(parallel=parallel, training={"clip_grad": 0.0, "zero_stage": stage}),
            prefix,
            rank,
            world_size,
        )
        for stage in (0, 1)
    ]
    return [[norm for _, norm in run.steps(2)] for run in runs]


@pytest.mark.parametrize("axis", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_the_norm_is_told_where_nothing_is_clipped(axis, tmp_path):
    prefix = tiny.write_store(tmp_path)
    ((alone, _),) = run_ranks(1, unclipped, prefix, {})
    for without_zero, with_zero in run_ranks(2, unclipped, prefix, {axis: 2}):
        assert without_zero == pytest.approx(alone, rel=1e-5)
        assert with_zero == pytest.approx(alone, rel=1e-5)
