"""A resumed run continues the loss scale; dtypes without one are left alone."""

from types import SimpleNamespace

import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaler

from megatron_ring.engine.optimizer_state import loss_scale, set_loss_scale


def zero_optimizer() -> SimpleNamespace:
    """Return the part of ZeRO's fp16 optimizers that holds the scale; CPUs do not train fp16."""
    return SimpleNamespace(
        loss_scaler=DynamicLossScaler(
            2**16, scale_window=2, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
        )
    )


def half_precision_optimizer() -> SimpleNamespace:
    """Return the part of the fp16 optimizer without ZeRO that holds the scale."""
    return SimpleNamespace(loss_scale_config=LossScaleConfig(torch.float16, True, 1.0, None))


def test_a_restored_scaler_continues_as_the_original_does(monkeypatch):
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # rank 0 reports each overflow
    original = zero_optimizer()
    resumed = zero_optimizer()
    for overflow in (True, True, False):
        original.loss_scaler.update_scale(overflow)
    set_loss_scale(resumed, loss_scale(original))
    for overflow in (False, False, True, False, True, False, False):
        original.loss_scaler.update_scale(overflow)
        resumed.loss_scaler.update_scale(overflow)
        assert vars(resumed.loss_scaler) == vars(original.loss_scaler)
    assert original.loss_scaler.cur_scale != 2**16


def test_the_scale_of_the_optimizer_without_zero_is_restored():
    original = half_precision_optimizer()
    resumed = half_precision_optimizer()
    original.loss_scale_config.cur_scale = 128.0
    original.loss_scale_config.cur_iter = 7
    set_loss_scale(resumed, loss_scale(original))
    assert vars(resumed.loss_scale_config) == vars(original.loss_scale_config)


def test_a_bf16_optimizer_ignores_the_state():
    bfloat16 = SimpleNamespace(loss_scaler=LossScaler(scale=1.0))
    set_loss_scale(bfloat16, loss_scale(zero_optimizer()))
    assert bfloat16.loss_scaler.cur_scale == 1.0
    assert loss_scale(bfloat16) == loss_scale(torch.optim.AdamW([torch.zeros(1)])) == {}
