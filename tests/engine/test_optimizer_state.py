"""The scale that a run has tuned goes on; types that have none are left alone."""

from types import SimpleNamespace

import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaler

from megatron_ring.engine.optimizer_state import loss_scale, set_loss_scale


def zero_optimizer() -> SimpleNamespace:
    """What ZeRO's optimizers have in fp16; no processor here computes in it."""
    return SimpleNamespace(
        loss_scaler=DynamicLossScaler(
            2**16, scale_window=2, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
        )
    )


def half_precision_optimizer() -> SimpleNamespace:
    """What the optimizer without ZeRO has in fp16."""
    return SimpleNamespace(loss_scale_config=LossScaleConfig(torch.float16, True, 1.0, None))


def test_a_scaler_goes_on_where_the_other_was(monkeypatch):
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # rank 0 reports each overflow
    straight, resumed = zero_optimizer(), zero_optimizer()
    for overflow in (True, True, False):
        straight.loss_scaler.update_scale(overflow)
    set_loss_scale(resumed, loss_scale(straight))
    for overflow in (False, False, True, False, True, False, False):
        straight.loss_scaler.update_scale(overflow)
        resumed.loss_scaler.update_scale(overflow)
        assert vars(resumed.loss_scaler) == vars(straight.loss_scaler)
    assert straight.loss_scaler.cur_scale != 2**16


def test_the_other_optimizer_s_scale_is_found_too():
    straight, resumed = half_precision_optimizer(), half_precision_optimizer()
    straight.loss_scale_config.cur_scale, straight.loss_scale_config.cur_iter = 128.0, 7
    set_loss_scale(resumed, loss_scale(straight))
    assert vars(resumed.loss_scale_config) == vars(straight.loss_scale_config)


def test_a_run_in_another_type_takes_nothing_from_it():
    bfloat16 = SimpleNamespace(loss_scaler=LossScaler(scale=1.0))
    set_loss_scale(bfloat16, loss_scale(zero_optimizer()))
    assert bfloat16.loss_scaler.cur_scale == 1.0
    assert loss_scale(bfloat16) == loss_scale(torch.optim.AdamW([torch.zeros(1)])) == {}
