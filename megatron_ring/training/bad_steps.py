"""What follows a bad step, on all ranks alike: the next one, or the newest checkpoint and then the next, or the end.

No weight has moved then (decision.py). Who goes back goes on with the samples behind the bad step, so that no data is
met twice. Going back does not begin the count of bad steps anew, only a checkpoint that a good step preceded does:
between two of them there are at most --max-bad-steps, so that no run turns in a circle.
"""

import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from megatron_ring.checkpoint.state import RunState
from megatron_ring.config import GuardsConfig
from megatron_ring.engine.engine import Engine, StepResult
from megatron_ring.errors import Diverged
from megatron_ring.monitoring.metrics import Report
from megatron_ring.monitoring.non_finite import origin
from megatron_ring.training.checkpointing import Saver

# So many good steps make a median that a single one of them does not move.
_ENOUGH = 16


class Guard:
    """The counts of a run that is at ``state``. skipped_steps, roll_backs: in all.

    since_save: bad steps since the last checkpoint that a good step preceded. good_since_save:
    whether there was a good step since the last checkpoint, so that the weights are others than
    there.
    """

    def __init__(self, options: GuardsConfig, state: RunState):
        self.options = options
        self.since_save = 0
        self.skipped_steps, self.roll_backs = state.skipped_steps, state.roll_backs
        self.restore_loss_history(state)

    def restore_loss_history(self, state: RunState) -> None:
        """Go on from the losses that a checkpoint has kept."""
        self._recent = deque(state.recent_losses, maxlen=self.options.loss_spike_window)
        self.good_since_save = False

    @property
    def highest_loss(self) -> float:
        """A loss above it is a spike; nats per token."""
        if not self.options.loss_spike_factor or len(self._recent) < _ENOUGH:
            return math.inf
        return self.options.loss_spike_factor * statistics.median(self._recent)

    @property
    def stops(self) -> bool:
        """Whether the run ends at the bad step that was counted last."""
        return self.options.on_bad_step == "stop" or self.since_save > self.options.max_bad_steps

    def count(self, result: StepResult) -> None:
        """Every step, once, before what follows it."""
        if not result.refused:
            self.good_since_save = True
            return self._recent.append(result.loss)
        self.since_save += 1
        if not self.stops:
            self.skipped_steps += self.options.on_bad_step == "skip"
            self.roll_backs += self.options.on_bad_step == "roll-back"

    def saved(self) -> None:
        """A checkpoint was taken. Bad steps are counted from there if a good step preceded it, and
        go on otherwise: weights that no step can move are no new beginning.
        """
        if self.good_since_save:
            self.since_save = 0
        self.good_since_save = False

    def kept(self) -> dict[str, Any]:
        """What a checkpoint's state says of it, by its names there."""
        losses = list(self._recent) if self.options.loss_spike_factor else []
        return {
            "skipped_steps": self.skipped_steps,
            "roll_backs": self.roll_backs,
            "recent_losses": losses,
        }

    def fault(self, result: StepResult) -> str:
        """What is bad about a step that was refused and counted."""
        for name, value in (("loss", result.loss), ("gradient norm", result.grad_norm)):
            if not math.isfinite(value):
                return f"its {name} is {value}"
        factor, steps = self.options.loss_spike_factor, len(self._recent)
        return (
            f"its loss {result.loss:.4f} is above {self.highest_loss:.4f}, {factor:g} x the median of the last "
            f"{steps} good steps"
        )


class BadSteps:
    """Every method is collective: all ranks call it after the same step, which ``guard`` has counted."""

    def __init__(self, engine: Engine, guard: Guard, saver: Saver, report: Report):
        self.engine, self.guard, self.saver, self.report = engine, guard, saver, report

    def answer(self, step: int, result: StepResult, samples: range) -> int:
        """The step that the run goes on from; raises Diverged where it ends. ``samples``: what the step has read."""
        newest, goes_back = self.saver.newest(), self.guard.options.on_bad_step == "roll-back"
        words = self._fault(step, result, samples)
        if self.guard.stops or (goes_back and newest is None):
            raise Diverged([*words, *self._ending(newest)])
        if not goes_back:
            self.report.log("; ".join([*words, "it is skipped"]))
            return step
        return self._gone_back(words)

    def _gone_back(self, words: list[str]) -> int:
        stored = self.saver.load_newest(self.engine)
        self.guard.restore_loss_history(stored.state)
        for passed_over in stored.skipped:
            self.report.log(passed_over)
        self.report.log(
            "; ".join([*words, f"back to {stored.path}, and on with the samples behind these"])
        )
        self.report.rewind_to(stored.state.step)
        return stored.state.step

    def _fault(self, step: int, result: StepResult, samples: range) -> list[str]:
        """What is bad about the step and, unless it is a spike of values that are finite, where that began."""
        words = [
            f"step {step}, of samples {samples.start} to {samples[-1]}, is bad: {self.guard.fault(result)}"
        ]
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            return words
        return [*words, origin(self.saver.consensus.gather(self.engine.non_finite_report))]

    def _ending(self, newest: Path | None) -> list[str]:
        """Why the run ends, and how it goes on."""
        options = self.guard.options
        if options.on_bad_step == "stop":
            why = "--on-bad-step stop ends the run here"
        elif self.guard.stops:
            why = f"more than max_bad_steps {options.max_bad_steps} were bad since the last checkpoint, or the start"
        else:
            why = "--on-bad-step roll-back has no checkpoint to go back to yet"
        if newest is None:
            goes_on = "There is no checkpoint"
        elif newest == self.saver.finish():  # this run's own, so the newest of its folder
            goes_on = f"--load {newest.parent} goes on from {newest.name}"
        else:
            goes_on = f"--load {newest} goes on from there"
        return [f"{why}. No weight has moved in it and nothing of it is saved. {goes_on}."]
