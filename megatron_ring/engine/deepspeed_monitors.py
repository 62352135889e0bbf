"""DeepSpeed's monitors (TensorBoard, wandb, CSV, Comet), run beside its engine instead of in it.

Under DeepSpeed an error in one would end the run, and it reports samples where we report steps,
which wandb drops.
"""

from typing import Any

import torch.distributed as dist
from deepspeed.monitor.comet import CometMonitor
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor

from megatron_ring.monitoring.metrics import Monitor
from megatron_ring.monitoring.outputs import BestEffort

# By their names in DeepSpeed's config.
_MONITORS = {
    "tensorboard": TensorBoardMonitor,
    "wandb": WandbMonitor,
    "csv_monitor": csvMonitor,
    "comet": CometMonitor,
}


def without_monitors(config: dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's config without its monitors."""
    return {key: value for key, value in config.items() if key not in _MONITORS}


def start_monitors(config: dict[str, Any]) -> dict[str, Monitor]:
    """Start those of DeepSpeed's monitors that ``config`` enables, on global rank 0.

    One that fails to start is left out, with a warning.
    """
    settings = get_monitor_config(config)
    if dist.get_rank() != 0:
        return {}
    best_effort = BestEffort()
    started = {}
    for name, kind in _MONITORS.items():
        options = getattr(settings, name)
        if options.enabled and (monitor := best_effort(name, kind, options)):
            started[name] = monitor.write_events
    return started
