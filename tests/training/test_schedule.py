"""The learning rate is a function of the step alone."""

from itertools import pairwise

import pytest

from megatron_ring.config import TrainingConfig
from megatron_ring.training.schedule import learning_rate


def rates(style: str, **changes) -> list[float]:
    config = TrainingConfig(
        train_iters=10, lr=1.0, min_lr=0.1, **{"lr_warmup_iters": 2, "lr_decay_style": style} | changes
    )
    return [learning_rate(step, config) for step in range(1, 11)]


def test_linear_warms_up_and_falls_by_equal_steps_to_the_floor():
    assert rates("linear") == pytest.approx([0.5, 1.0, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125, 0.1])


def test_cosine_is_halfway_down_in_the_middle_and_ends_at_the_floor():
    cosine = rates("cosine")
    assert cosine[:2] == pytest.approx([0.5, 1.0])
    assert cosine[5] == pytest.approx(0.55)
    assert cosine[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(cosine[1:]))


def test_constant_stays_at_the_peak():
    assert rates("constant") == pytest.approx([0.5] + [1.0] * 9)


def test_without_warm_up_the_decay_begins_at_once():
    assert rates("linear", lr_warmup_iters=0)[0] == pytest.approx(0.91)
