"""The loss over counted tokens and the gradient norm, whichever rank they lie on."""

import pytest
import torch

from megatron_ring.data.document_boundaries import IGNORE_INDEX
from megatron_ring.engine.loss_and_norm import clip_gradients, counted_tokens, token_mean_factor
from megatron_ring.kernels.cross_entropy import head_loss_sum
from megatron_ring.parallel.collectives import ProcessGroups
from tests.distributed import run_ranks
from tests.training import tiny

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(2, 6, 4, generator=GENERATOR, dtype=torch.float64)
WEIGHT = torch.randn(11, 4, generator=GENERATOR, dtype=torch.float64)
TARGETS = torch.tensor([[1, 2, 3, IGNORE_INDEX, 5, 6], [IGNORE_INDEX, 8, 9, 10, 0, 1]])


def expected_mean() -> torch.Tensor:
    log_probability = (HIDDEN @ WEIGHT.T).log_softmax(-1)
    losses = [
        -log_probability[b, t, TARGETS[b, t]]
        for b in range(2)
        for t in range(6)
        if TARGETS[b, t] != IGNORE_INDEX
    ]
    return torch.stack(losses).mean()


def test_the_loss_sum_over_the_count_is_the_mean_over_counted_tokens():
    mean = head_loss_sum(HIDDEN, WEIGHT, TARGETS) / counted_tokens(TARGETS)
    torch.testing.assert_close(mean, expected_mean())


def test_losses_of_ranks_with_uneven_counts_average_to_the_token_mean():
    # Three ranks with 6, 4 and 0 counted tokens: a mean of their means would be wrong, or nan.
    parts = [(HIDDEN[:, :4], TARGETS[:, :4]), (HIDDEN[:, 4:], TARGETS[:, 4:])]
    parts.append((HIDDEN[:, :2], torch.full((2, 2), IGNORE_INDEX)))
    scale = token_mean_factor(counted_tokens(TARGETS), averaged_over=3)
    shares = [head_loss_sum(hidden, WEIGHT, targets) * scale for hidden, targets in parts]
    torch.testing.assert_close(sum(shares) / 3, expected_mean())


def test_a_rank_without_counted_tokens_has_zero_loss_and_zero_gradients():
    hidden = HIDDEN.clone().requires_grad_()
    nothing = torch.full((2, 6), IGNORE_INDEX)
    share = head_loss_sum(hidden, WEIGHT, nothing) * token_mean_factor(
        counted_tokens(nothing), averaged_over=4
    )
    share.backward()
    assert share == 0
    assert (hidden.grad == 0).all()


def parameter(gradient: list[float], **attributes: object) -> torch.nn.Parameter:
    created = torch.nn.Parameter(torch.zeros(len(gradient)))
    created.grad = torch.tensor(gradient)
    for name, value in attributes.items():
        setattr(created, name, value)
    return created


def test_gradients_above_the_maximum_norm_are_scaled_down_to_it():
    parameters = [parameter([3.0]), parameter([0.0, 4.0]), torch.nn.Parameter(torch.zeros(1))]
    assert clip_gradients(parameters, 10.0, ProcessGroups()) == pytest.approx(5.0)
    assert parameters[0].grad.item() == 3.0
    assert clip_gradients(parameters, 1.0, ProcessGroups()) == pytest.approx(5.0)
    torch.testing.assert_close(
        torch.cat([parameters[0].grad, parameters[1].grad]), torch.tensor([0.6, 0.0, 0.8])
    )


def test_a_tied_copy_on_a_later_stage_is_clipped_but_not_counted():
    first = parameter([3.0])
    copy = parameter([4.0], ds_pipe_replicated=True)
    assert clip_gradients([first, copy], 1.5, ProcessGroups()) == pytest.approx(3.0)
    torch.testing.assert_close(copy.grad, torch.tensor([2.0]))


def norms_without_clipping(rank: int, world_size: int, prefix, parallel: dict) -> list[list[float]]:
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
def test_the_norm_is_reported_without_clipping(axis, tmp_path):
    prefix = tiny.write_store(tmp_path)
    ((alone, _),) = run_ranks(1, norms_without_clipping, prefix, {})
    for without_zero, with_zero in run_ranks(2, norms_without_clipping, prefix, {axis: 2}):
        assert without_zero == pytest.approx(alone, rel=1e-5)
        assert with_zero == pytest.approx(alone, rel=1e-5)
