"""Guards: how high the next loss may be, which steps were bad, and how many. What follows one is bad_steps.py's.

A spike is measured by the median of the last good steps' losses: no single step moves it, and while losses fall it
lags above them, so that nothing good is refused. A refused loss never enters it. Losses that rise for good would
therefore be refused for ever, but for --max-bad-steps. All ranks count the same, from the same losses (decision.py).
"""

import math
import statistics
from collections import deque
from typing import Any

from megatron_ring.checkpoint.state import RunState
from megatron_ring.config import GuardsConfig
from megatron_ring.engine.engine import StepResult

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
