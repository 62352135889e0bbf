"""Detects loss spikes, counts bad steps, and skips them, rolls back or ends the run.

A step is bad if its loss or gradient norm is not finite, or its loss is a spike. It was refused
before any weight changed (engine/loss_and_norm.py), and all ranks act on it alike, from the same
numbers.

A spike is measured against the median loss of the last good steps: no single step moves the median,
and while losses fall it lags above them, so no good step is refused. A refused loss never enters
it. A loss that rises permanently would therefore be refused forever, were it not for
--max-bad-steps.

After a roll back the run continues with the samples that follow the bad step, so that it reads no
data twice. A roll back does not reset the count of bad steps; only a checkpoint with a good step
before it does. So there are at most --max-bad-steps between two such checkpoints, and a run cannot
roll back to the same checkpoint forever.
"""

import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from megatron_ring.checkpoint.state import RunState
from megatron_ring.config import GuardsConfig
from megatron_ring.engine.engine import Engine, StepResult
from megatron_ring.errors import Diverged, counted
from megatron_ring.monitoring.metrics import Reporter
from megatron_ring.monitoring.non_finite import origin
from megatron_ring.training.checkpointing import Saver

# With fewer good steps, a single one of them would move the median.
_MIN_GOOD_STEPS = 16


class Guard:
    """The limit for the next loss and the counts of bad steps, of a run that is at ``state``.

    skipped_steps, roll_backs: totals of the run. since_save: bad steps since the last checkpoint
    that had a good step before it. good_since_save: whether there was a good step since the last
    checkpoint, so that the weights differ from those in it.
    """

    def __init__(self, options: GuardsConfig, state: RunState):
        self.options = options
        self.since_save = 0
        self.skipped_steps = state.skipped_steps
        self.roll_backs = state.roll_backs
        self.restore_loss_history(state)

    def restore_loss_history(self, state: RunState) -> None:
        """Continue with the recent losses that a checkpoint holds."""
        self._recent_losses = deque(state.recent_losses, maxlen=self.options.loss_spike_window)
        self.good_since_save = False

    @property
    def highest_loss(self) -> float:
        """The loss above which a step is a spike, in nats per token."""
        if not self.options.loss_spike_factor or len(self._recent_losses) < _MIN_GOOD_STEPS:
            return math.inf
        return self.options.loss_spike_factor * statistics.median(self._recent_losses)

    @property
    def stops(self) -> bool:
        """Whether the run ends at the bad step that was counted last."""
        return self.options.on_bad_step == "stop" or self.since_save > self.options.max_bad_steps

    def count(self, result: StepResult) -> None:
        """Count a step, good or bad. Called once for every step, before a bad one is handled."""
        if not result.refused:
            self.good_since_save = True
            self._recent_losses.append(result.loss)
            return
        self.since_save += 1
        if not self.stops:
            self.skipped_steps += self.options.on_bad_step == "skip"
            self.roll_backs += self.options.on_bad_step == "roll-back"

    def saved(self) -> None:
        """Note that a checkpoint was written.

        Bad steps are counted anew only if a good step preceded it: without one, the weights are
        those of the checkpoint before.
        """
        if self.good_since_save:
            self.since_save = 0
        self.good_since_save = False

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint's RunState keeps of the guard, by its field names."""
        losses = list(self._recent_losses) if self.options.loss_spike_factor else []
        return {
            "skipped_steps": self.skipped_steps,
            "roll_backs": self.roll_backs,
            "recent_losses": losses,
        }

    def reason(self, result: StepResult) -> str:
        """Return why a step was refused; it has been counted."""
        for name, value in (("loss", result.loss), ("gradient norm", result.grad_norm)):
            if not math.isfinite(value):
                return f"its {name} is {value}"
        factor = self.options.loss_spike_factor
        return (
            f"its loss {result.loss:.4f} is above {self.highest_loss:.4f}, {factor:g} x the median "
            f"of the last {counted(len(self._recent_losses), 'good step')}"
        )


class BadSteps:
    """Handles bad steps. ``handle`` is collective: all ranks call it after the same step."""

    def __init__(self, engine: Engine, guard: Guard, saver: Saver, report: Reporter):
        self.engine = engine
        self.guard = guard
        self.saver = saver
        self.report = report

    def handle(self, step: int, result: StepResult, samples: range) -> int:
        """Return the step to continue after: ``step``, or the checkpoint's after a roll back.

        ``guard`` has counted the step, which read ``samples``. Raises Diverged if the run ends.
        """
        newest = self.saver.newest()
        rolls_back = self.guard.options.on_bad_step == "roll-back"
        problems = self._problems(step, result, samples)
        if self.guard.stops or (rolls_back and newest is None):
            raise Diverged([*problems, *self._final_advice(newest)])
        if rolls_back:
            return self._roll_back(problems)
        self.report.log("; ".join([*problems, "it is skipped"]))
        return step

    def _roll_back(self, problems: list[str]) -> int:
        stored = self.saver.load_newest(self.engine)
        self.guard.restore_loss_history(stored.state)
        for damaged in stored.skipped:
            self.report.log(damaged)
        action = f"rolled back to {stored.path}, continuing with the following samples"
        self.report.log("; ".join([*problems, action]))
        self.report.rewind_to(stored.state.step)
        return stored.state.step

    def _problems(self, step: int, result: StepResult, samples: range) -> list[str]:
        """Describe the bad step and, for non-finite values, the layer and rank they began in."""
        reason = self.guard.reason(result)
        problem = f"step {step}, of samples {samples.start} to {samples[-1]}, is bad: {reason}"
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            return [problem]
        return [problem, origin(self.saver.consensus.gather(self.engine.non_finite_report))]

    def _final_advice(self, newest: Path | None) -> list[str]:
        """Describe why the run ends, and how to continue it."""
        options = self.guard.options
        if options.on_bad_step == "stop":
            why = "--on-bad-step stop ends the run here"
        elif self.guard.stops:
            why = (
                f"more than max_bad_steps {options.max_bad_steps} were bad since the last "
                "checkpoint, or the start"
            )
        else:
            why = "--on-bad-step roll-back has no checkpoint to go back to yet"
        if newest is None:
            how = "There is no checkpoint"
        elif newest == self.saver.finish():  # this run's own, so the newest of its folder
            how = f"--load {newest.parent} continues from {newest.name}"
        else:
            how = f"--load {newest} continues from there"
        return [f"{why}. The step changed no weights and is not saved. {how}."]
