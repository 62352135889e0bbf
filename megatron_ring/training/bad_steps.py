"""What follows a bad step, on all ranks alike: the next one, or the newest checkpoint and then the next, or the end.

No weight has moved then (decision.py). Who goes back goes on with the samples behind the bad step, so that no data is
met twice. Going back does not begin the count of bad steps anew, only a checkpoint that a good step preceded does:
between two of them there are at most --max-bad-steps, so that no run turns in a circle.
"""

import math
from pathlib import Path

from megatron_ring.engine.engine import Engine, StepResult
from megatron_ring.errors import Diverged
from megatron_ring.monitoring.metrics import Report
from megatron_ring.monitoring.non_finite import origin
from megatron_ring.training.checkpointing import Saver
from megatron_ring.training.guards import Guard


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
        return [*words, origin(self.saver.consensus.gather(self.engine.seen))]

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
