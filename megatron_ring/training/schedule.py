"""The learning-rate schedule: linear warm-up, then cosine, linear or constant decay.

The rate is a function of the step and the options alone.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from megatron_ring.config import TrainingConfig
from megatron_ring.errors import counted, flag

_DECAY = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}

_OPTIONS = ("lr", "min_lr", "lr_warmup_iters", "lr_decay_style", "lr_decay_iters", "train_iters")


class Warmup(NamedTuple):
    """The warm-up of a run, in optimizer steps; reason: why it is that long, for the console."""

    iters: int
    reason: str


def warmup_of(config: TrainingConfig, stored: TrainingConfig | None = None) -> Warmup:
    """Resolve --lr-warmup-iters.

    ``stored``: the options of the checkpoint that the run resumes from, whose warm-up auto keeps;
    None for a run from step 0.
    """
    if config.lr_warmup_iters != "auto":
        return Warmup(config.lr_warmup_iters, "set by --lr-warmup-iters")
    if stored:
        return Warmup(stored.warmup_iters, "auto: as in the checkpoint")
    steps = counted(config.decay_horizon, "step")
    reason = f"auto: a tenth of the schedule's {steps}, at most 20"
    return Warmup(config.warmup_iters, reason)


class MinLr(NamedTuple):
    """The rate at the end of the decay; reason: why it is that, for the console."""

    value: float
    reason: str


def min_lr_of(config: TrainingConfig, stored: TrainingConfig | None = None) -> MinLr:
    """Resolve --min-lr.

    ``stored``: the options of the checkpoint that the run resumes from, whose min_lr auto keeps
    while lr is the same; None for a run from step 0.
    """
    if config.min_lr != "auto":
        return MinLr(config.min_lr, "set by --min-lr")
    if stored and stored.lr == config.lr:
        return MinLr(stored.final_lr, "auto: as in the checkpoint")
    return MinLr(config.final_lr, f"auto: a tenth of --lr {config.lr:g}, at most 0.0001")


class Schedule(NamedTuple):
    """The parts of a schedule that have an ``auto``, resolved."""

    warmup: Warmup
    min_lr: MinLr

    @staticmethod
    def of(config: TrainingConfig, stored: TrainingConfig | None = None) -> "Schedule":
        """Resolve the options; ``stored`` are those of the checkpoint that is resumed, if any."""
        return Schedule(warmup_of(config, stored), min_lr_of(config, stored))

    def applied_to(self, config: TrainingConfig) -> TrainingConfig:
        """Return ``config`` with numbers instead of auto."""
        return replace(config, lr_warmup_iters=self.warmup.iters, min_lr=self.min_lr.value)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the rate of optimizer step ``step``, counted from 1.

    It is lr at the end of the warm-up and final_lr from the horizon (config.decay_horizon) on.
    """
    warmup_iters = config.warmup_iters
    if step <= warmup_iters:
        return config.lr * step / warmup_iters
    decay_iters = config.decay_horizon - warmup_iters
    progress = min(1.0, (step - warmup_iters) / max(1, decay_iters))
    floor = config.lr if config.lr_decay_style == "constant" else config.final_lr
    return floor + (config.lr - floor) * _DECAY[config.lr_decay_style](progress)


def change_on_resume(step: int, then: TrainingConfig, now: TrainingConfig) -> str | None:
    """Describe how the rate changes after ``step`` if the schedule is not the checkpoint's.

    ``then``: the options that the checkpoint was written with. Returns None if the next step has
    the rate that it would have had under them.
    """
    if step >= now.train_iters:
        return None
    last = learning_rate(step, then)
    unchanged = learning_rate(step + 1, then)
    following = learning_rate(step + 1, now)
    if math.isclose(unchanged, following, rel_tol=1e-9):
        return None
    differing = [name for name in _OPTIONS if getattr(then, name) != getattr(now, name)]
    changes = ", ".join(
        f"{name} {getattr(then, name)} in the checkpoint, now {getattr(now, name)}"
        for name in differing
    )
    return (
        f"{last:.3e} at step {step}, {following:.3e} at step {step + 1}, where the checkpoint's "
        f"schedule has {unchanged:.3e} ({changes}). {_remedy(differing, then, now)}"
    )


def _remedy(differing: list[str], then: TrainingConfig, now: TrainingConfig) -> str:
    """State the flags that keep the checkpoint's schedule."""
    horizons = ("train_iters", "lr_decay_iters")
    flags = [f"{flag(name)} {getattr(then, name)}" for name in differing if name not in horizons]
    if then.decay_horizon != now.decay_horizon and then.lr_decay_style != "constant":
        flags.append(f"--lr-decay-iters {then.decay_horizon}")
    return f"To keep that schedule set {' '.join(flags)}."
