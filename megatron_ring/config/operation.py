"""The ``checkpoint``, ``guards`` and ``logging`` sections: saving, bad steps and reporting."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ring.config.checks import negative
from megatron_ring.errors import not_positive

_MIN_SPIKE_WINDOW = 16


@dataclass(frozen=True)
class CheckpointConfig:
    """Where and when checkpoints are written, and what a run starts from."""

    save: str = ""
    """Folder that checkpoints are written to. Empty: none are written."""
    load: str = ""
    """Folder to resume from: its newest complete checkpoint is loaded, or the checkpoint itself if
    the folder is one. Random weights are used if it is empty, or if it is --save and has no
    checkpoint yet."""
    finetune: bool = False
    """Load only the weights from --load, for a new run with step 0, the first sample and a new
    optimizer; RoPE options, windows and length may differ. Once --save has a checkpoint the run
    resumes from it, so the same command can be restarted."""
    allow_other_data: bool = False
    """Resume although --data-path has other tokens than the checkpoint's run: a store that was
    rebuilt, added or removed. The run continues at the same sample number, which may contain text
    that was read before."""
    save_interval: int = 0
    """Steps between checkpoints. With --save there is always one after the last step. 0: only that
    one."""
    async_save: bool = False
    """Copy a checkpoint to CPU memory and write it while training continues. The next checkpoint
    waits for it."""
    keep_last: int = 0
    """Number K of newest checkpoints to keep; older ones are deleted once a new one is complete, so
    there must be space for K + 1. 0: all are kept."""
    keep_every: int = 0
    """With --keep-last, also keep checkpoints of steps that are multiples of this. 0: none."""

    def problems(self) -> list[str]:
        """Return all problems of this section."""
        problems = negative(self, "save_interval", "keep_last", "keep_every")
        if self.save_interval and not self.save:
            problems.append(
                f"save_interval {self.save_interval} has no effect while save is empty. Set --save."
            )
        if self.finetune and not self.load:
            problems.append("finetune needs weights, but load is empty. Set --load.")
        if self.allow_other_data and not self.load:
            problems.append(
                "allow_other_data has no effect while load is empty. Set --load, or leave out "
                "--allow-other-data."
            )
        if self.finetune and self.load and self.load == self.save:
            problems.append(
                f"finetune starts a new run from the weights in load {self.load}, but save is the "
                "same folder, which has the old run's checkpoints. Set --save to another folder."
            )
        if self.async_save and not self.save:
            problems.append(
                "async_save has no effect while save is empty. Set --save, or leave out "
                "--async-save."
            )
        if self.keep_last > 0 and not self.save:
            problems.append(
                f"keep_last {self.keep_last} has no effect while save is empty. Set --save, or "
                "--keep-last 0."
            )
        if self.keep_every > 0 and self.keep_last == 0:
            problems.append(
                f"keep_every {self.keep_every} has no effect while keep_last is 0, which keeps all "
                "checkpoints. Set --keep-last, or --keep-every 0."
            )
        return problems


@dataclass(frozen=True)
class GuardsConfig:
    """What happens after a step whose loss or gradient is not usable."""

    on_bad_step: Literal["skip", "roll-back", "stop"] = "skip"
    """Action after a bad step, that is one whose loss or gradient norm is not finite or whose loss
    is a spike. Weights are not updated. skip: continue with the next step, so a bad sample or a
    transient fault costs one step; roll-back: reload the newest checkpoint and continue with the
    following samples; stop: end the run with exit code 6."""
    max_bad_steps: int = 10
    """Maximum number of bad steps since the start, or since the last checkpoint after a good step.
    One more ends the run with exit code 6, because the fault is not transient."""
    loss_spike_factor: float = 0.0
    """A loss above this multiple of the median loss of recent good steps is a spike, from the 17th
    good step on. 1.5 to 2 tolerates noise. If losses rise permanently, max_bad_steps ends the run.
    Must be above 1. 0: disabled."""
    loss_spike_window: int = 128
    """Number of recent good steps whose losses form the median; a checkpoint stores them. At least
    16."""

    def problems(self) -> list[str]:
        """Return all problems of this section."""
        problems = negative(self, "max_bad_steps", "loss_spike_factor")
        if 0 < self.loss_spike_factor <= 1:
            problems.append(
                f"loss_spike_factor {self.loss_spike_factor} would make every other step a spike: "
                "it must be above 1, or 0 to disable the check. Set --loss-spike-factor."
            )
        if self.loss_spike_window < _MIN_SPIKE_WINDOW:
            problems.append(
                f"loss_spike_window {self.loss_spike_window} is too short for a median that one "
                f"spike does not move: it must be at least {_MIN_SPIKE_WINDOW}. "
                "Set --loss-spike-window."
            )
        return problems


@dataclass(frozen=True)
class LoggingConfig:
    """Console, metrics file, monitors and ring profiling."""

    log_interval: int = 10
    """Steps between console lines."""
    metrics_file: str = ""
    """File for one JSON object per step; the loss is plotted as loss.png beside it. A resumed run
    continues the file, and lines of repeated steps are moved to FILE.superseded. A run from step 0
    renames an existing file to FILE.1, FILE.2, ... and overwrites no file. Empty: none."""
    tensorboard_dir: str = ""
    """Folder for TensorBoard events. Empty: none."""
    wandb_project: str = ""
    """Weights & Biases project to report to; WANDB_MODE=offline is supported. Empty: none."""
    csv_dir: str = ""
    """Folder for one CSV file per metric. Empty: none."""
    straggler_threshold: float = 1.25
    """Warn, once per log interval, about a rank whose compute time in ring hops is above this
    multiple of the ranks' mean, adjusted for its share of the work. Waits do not count. A rank that
    is reported repeatedly is slow. Must be above 1. On CUDA the times are the device's. 0:
    disabled."""
    profile_ring: bool = False
    """Profile the ring in every step. The metrics file gets each hop's compute time, wait, bytes
    and imbalance over ranks; the console gets the shares of attention, exposed communication, data
    and optimizer. On a CPU the host's clock measures them, on CUDA events in the device's stream,
    read once a step."""
    profile_ring_trace: str = ""
    """File for a trace of a few steps of all ranks, for https://ui.perfetto.dev and
    chrome://tracing; about 3 KB per hop, layer, pass and rank. Needs --profile-ring. Empty:
    none."""
    profile_ring_steps: int = 2
    """Number of steps in the trace, from the run's third step on."""

    def problems(self) -> list[str]:
        """Return all problems of this section."""
        problems = not_positive(self, "log_interval", "profile_ring_steps")
        if not (self.straggler_threshold == 0 or 1 < self.straggler_threshold < math.inf):
            problems.append(
                f"straggler_threshold {self.straggler_threshold} must be above 1 (the mean), or 0 "
                "to disable the warning. Set --straggler-threshold."
            )
        if Path(self.metrics_file).name == "loss.png":
            problems.append(
                f"metrics_file {self.metrics_file} is the name of the loss plot. "
                "Set --metrics-file to another name, such as metrics.jsonl."
            )
        if self.metrics_file and self.profile_ring_trace == self.metrics_file:
            problems.append(
                f"profile_ring_trace {self.profile_ring_trace} is also the metrics file. "
                "Set --profile-ring-trace or --metrics-file to another file."
            )
        if self.profile_ring_trace and not self.profile_ring:
            problems.append(
                f"profile_ring_trace {self.profile_ring_trace} has no effect without profile_ring. "
                "Set --profile-ring, or leave out --profile-ring-trace."
            )
        return problems
