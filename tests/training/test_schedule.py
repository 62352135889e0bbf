"""The learning rate as a function of the step, and its changes after a resume."""

from dataclasses import replace
from itertools import pairwise

import pytest

from megatron_ring.config import TrainingConfig
from megatron_ring.training.schedule import Schedule, change_on_resume, learning_rate, warmup_of


def rates(style: str, **changes) -> list[float]:
    config = TrainingConfig(
        **{
            "train_iters": 10,
            "lr": 1.0,
            "min_lr": 0.1,
            "lr_warmup_iters": 2,
            "lr_decay_style": style,
        }
        | changes
    )
    return [learning_rate(step, config) for step in range(1, 11)]


def test_linear_warms_up_and_decays_by_equal_steps_to_min_lr():
    assert rates("linear") == pytest.approx(
        [0.5, 1.0, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125, 0.1]
    )


def test_cosine_is_halfway_in_the_middle_and_ends_at_min_lr():
    cosine = rates("cosine")
    assert cosine[:2] == pytest.approx([0.5, 1.0])
    assert cosine[5] == pytest.approx(0.55)
    assert cosine[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(cosine[1:]))


def test_constant_stays_at_the_peak():
    assert rates("constant") == pytest.approx([0.5] + [1.0] * 9)


def test_without_warm_up_decay_begins_at_the_first_step():
    assert rates("linear", lr_warmup_iters=0)[0] == pytest.approx(0.91)


@pytest.mark.parametrize(
    ("options", "iters"),
    [
        ({"train_iters": 1}, 0),
        ({"train_iters": 10}, 1),
        ({"train_iters": 199}, 19),
        ({"train_iters": 200}, 20),
        ({"train_iters": 10**6}, 20),
        ({"train_iters": 10, "lr_decay_iters": 150}, 15),
        ({"train_iters": 1000, "lr_decay_iters": 10}, 1),
        ({"train_iters": 50, "lr_decay_style": "constant"}, 5),
    ],
)
def test_auto_warms_up_for_a_tenth_of_the_schedule_and_at_most_20_steps(options, iters):
    automatic = TrainingConfig(**options)
    explicit = replace(automatic, lr_warmup_iters=iters)
    assert automatic.problems() == []
    assert warmup_of(automatic).iters == iters
    for step in range(1, min(automatic.train_iters, 40) + 1):
        assert learning_rate(step, automatic) == learning_rate(step, explicit)


def test_auto_keeps_the_warm_up_of_a_checkpoint_and_a_number_does_not():
    stored = schedule(train_iters=300, lr_warmup_iters=7)
    longer = schedule(train_iters=400, lr_warmup_iters="auto")
    assert warmup_of(longer, stored).iters == 7
    assert "checkpoint" in warmup_of(longer, stored).reason
    assert warmup_of(schedule(lr_warmup_iters=3), stored).iters == 3
    assert "--lr-warmup-iters" in warmup_of(schedule(lr_warmup_iters=3), stored).reason


@pytest.mark.parametrize(
    ("lr", "min_lr"), [(1e-2, 1e-4), (1e-3, 1e-4), (5e-4, 5e-5), (1e-4, 1e-5), (1e-9, 1e-10)]
)
def test_by_default_the_rate_falls_to_a_tenth_of_lr_and_at_most_1e_4(lr, min_lr):
    config = TrainingConfig(lr=lr)
    assert config.problems() == []
    assert config.final_lr == pytest.approx(min_lr)
    assert learning_rate(200, config) == config.final_lr
    assert Schedule.of(config).applied_to(config).min_lr == config.final_lr


def test_by_default_the_rates_are_those_of_the_earlier_default():
    explicit = replace(TrainingConfig(), min_lr=1e-4)
    for step in range(1, 201):
        assert learning_rate(step, TrainingConfig()) == learning_rate(step, explicit)


def test_lr_decay_iters_fixes_the_decay_whatever_train_iters_is():
    short = rates("cosine", lr_decay_iters=6)
    assert short[5:] == pytest.approx([0.1] * 5)
    assert rates("cosine", lr_decay_iters=6, train_iters=1000) == short
    assert rates("cosine", lr_decay_iters=1000) == rates("cosine", train_iters=1000)


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"lr_decay_iters": 20, "lr_warmup_iters": 20}, ["--lr-decay-iters", "at least 21"]),
        ({"lr_decay_iters": 20, "lr_decay_style": "constant"}, ["--lr-decay-iters 0"]),
        ({"lr_decay_iters": -1, "lr_warmup_iters": 0}, ["--lr-decay-iters"]),
    ],
)
def test_lr_decay_iters_within_the_warm_up_or_without_decay_is_refused(changes, flags):
    [problem] = TrainingConfig(**changes).problems()[:1]
    assert all(flag in problem for flag in flags)


def schedule(**changes) -> TrainingConfig:
    return TrainingConfig(
        **{"train_iters": 10, "lr": 1.0, "min_lr": 0.1, "lr_warmup_iters": 2} | changes
    )


def test_a_longer_run_gets_both_rates_and_the_flag_that_keeps_the_schedule():
    changed = change_on_resume(10, schedule(), schedule(train_iters=20))
    assert "1.000e-01 at step 10, 5.500e-01 at step 11" in changed
    assert "train_iters 10 in the checkpoint, now 20" in changed
    assert "--lr-decay-iters 10" in changed
    kept = schedule(train_iters=20, lr_decay_iters=10)
    assert change_on_resume(10, schedule(), kept) is None
    assert learning_rate(11, kept) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("now", "flags"),
    [
        ({"lr": 0.5}, "set --lr 1.0."),
        ({"lr_decay_style": "linear"}, "set --lr-decay-style cosine."),
        ({"min_lr": 0.0, "train_iters": 11}, "set --min-lr 0.1 --lr-decay-iters 10."),
    ],
)
def test_another_schedule_is_described_with_the_flags_that_restore_it(now, flags):
    assert flags in change_on_resume(4, schedule(), schedule(**now))


@pytest.mark.parametrize(
    "now",
    [
        {},
        {"lr_decay_iters": 10},
        {"lr_decay_iters": 10, "train_iters": 30},
        {"train_iters": 4},
        {"weight_decay": 0.5},
    ],
)
def test_the_same_next_rate_is_not_mentioned(now):
    assert change_on_resume(4, schedule(), schedule(**now)) is None


def test_a_constant_rate_is_not_mentioned():
    constant = {"lr_decay_style": "constant"}
    assert change_on_resume(10, schedule(**constant), schedule(**constant, train_iters=20)) is None
