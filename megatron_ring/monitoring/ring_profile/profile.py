"""--profile-ring: every rank's log, taken step by step, its sums brought together, and kept where there is a trace."""

from typing import Any

from megatron_ring.monitoring.ring_profile.figures import as_numbers, figures, in_words
from megatron_ring.monitoring.ring_profile.gathered import gathered
from megatron_ring.monitoring.ring_profile.recorder import Recorder
from megatron_ring.monitoring.ring_profile.step import RingReport, StepTime
from megatron_ring.monitoring.ring_profile.sums import sums
from megatron_ring.monitoring.ring_profile.trace import StepLog
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.progress import ProgressTracker
from megatron_ring.parallel.stages import layers_of_stage
from megatron_ring.settings.setup import Setup

# Of a hop: its beginning, and of each of two transfers a beginning, an end, and four waits of two rows.
_ROWS_OF_HOP = 1 + 2 * (2 + 4 * 2)
_ROWS_OF_PASS = 2
_ROWS_OF_OPTIMIZER = 2


def rows_of_step(setup: Setup) -> int:
    """The most that a process logs in a step: each layer's ring goes forward and back, and again where recomputed."""
    layers = len(layers_of_stage(setup.config.model.num_layers, setup.grid.pipe, 0))
    passes = (2 + setup.config.memory.recompute_attention) * layers * setup.micro_batches
    return passes * (_ROWS_OF_PASS + setup.grid.ring * _ROWS_OF_HOP) + _ROWS_OF_OPTIMIZER


class Profile:
    """A run's. ``place`` has a log. Every method is collective."""

    def __init__(self, setup: Setup, place: ProgressTracker, consensus: Consensus):
        logging, self._rings = setup.config.logging, setup.grid.members("ring")
        self._log, self._consensus = place.log, consensus
        ring = next(ring for ring in self._rings if consensus.rank in ring)
        trace = logging.profile_ring_trace, logging.profile_ring_steps
        self._recorder = Recorder(*trace, ring, consensus) if logging.profile_ring_trace else None
        self._untold: list[dict[str, Any]] = []

    def begin(self) -> None:
        """What was logged since the last step, in a validation, is not the next one's."""
        self._log.clear()

    def end(self, time: StepTime) -> RingReport:
        rows = self._log.rows
        own = as_numbers(
            sums(rows, len(self._rings[0])), self._log.missed, time.seconds, time.data_seconds
        )
        of_ranks = gathered(own, self._consensus)
        lines = self._recorder.keep(StepLog(time, rows)) if self._recorder else []
        if of_ranks is None:
            return RingReport()
        self._untold.append(figures(of_ranks, self._rings))
        found = RingReport(self._untold[-1], [in_words(self._untold)] * time.is_told + lines)
        if time.is_told:
            self._untold = []
        return found

    def finish(self) -> list[str]:
        """What is left to say once the last step is over."""
        return self._recorder.finish() if self._recorder else []
