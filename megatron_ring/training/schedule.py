"""The learning rate of a step: linear warm-up, then cosine, linear or constant. A function of the step alone."""

import math

from megatron_ring.config import TrainingConfig

_DECAY = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of optimizer step ``step``, counted from 1: lr at the end of the warm-up, min_lr at the end."""
    if step <= config.lr_warmup_iters:
        return config.lr * step / config.lr_warmup_iters
    decay_iters = config.train_iters - config.lr_warmup_iters
    progress = min(1.0, (step - config.lr_warmup_iters) / max(1, decay_iters))
    floor = config.lr if config.lr_decay_style == "constant" else config.min_lr
    return floor + (config.lr - floor) * _DECAY[config.lr_decay_style](progress)
