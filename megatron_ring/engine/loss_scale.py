"""The loss scale of fp16, as far as a run has tuned it: read from DeepSpeed's optimizers, and set again.

It doubles after a number of steps without overflow and halves with each that has one (Micikevicius et al. 2018, Mixed
Precision Training, section 3.2), so a run that resumed without it would skip steps that it did not skip before.
"""

from typing import Any

_COUNTED = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scale(optimizer: Any) -> dict[str, float]:
    """What ``optimizer``'s scaler has counted; nothing in other types, whose losses are not scaled."""
    return {name: value for name, value in _state(optimizer).items() if name in _COUNTED}


def set_loss_scale(optimizer: Any, counted: dict[str, float]) -> None:
    """Go on from what ``loss_scale`` gave; without effect in other types."""
    _state(optimizer).update(counted)


def _state(optimizer: Any) -> dict[str, Any]:
    """The attributes of its scaler, where that adapts; ZeRO and the half-precision optimizers name theirs apart."""
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(
        optimizer, "loss_scale_config", None
    )
    adapts = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
    return vars(scaler) if adapts else {}
