"""What the training loop tells of its steps to learn of its rings: who is slow always, the rest if asked for.

Stragglers are looked for wherever there is a ring, once per log interval. With --profile-ring every step has its
figures, and with --profile-ring-trace a few have a trace. None of it on CUDA, where the device waits for a transfer and
not the host: the host's moments say nothing there.
"""

import time
from typing import Any

from megatron_ring.monitoring.ring_profile.hop_statistics import (
    as_numbers,
    figures,
    summary_line,
    sums,
)
from megatron_ring.monitoring.ring_profile.recording import Recorder
from megatron_ring.monitoring.ring_profile.report import RingReport, StepTime, gathered
from megatron_ring.monitoring.ring_profile.stragglers import Stragglers
from megatron_ring.monitoring.ring_profile.trace import StepLog
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.progress import ProgressTracker
from megatron_ring.parallel.stages import layers_of_stage
from megatron_ring.settings.setup import Setup

# --profile-ring: every rank's log, taken step by step, its sums brought together, and kept where there is a trace.

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
        found = RingReport(self._untold[-1], [summary_line(self._untold)] * time.is_told + lines)
        if time.is_told:
            self._untold = []
        return found

    def finish(self) -> list[str]:
        """What is left to say once the last step is over."""
        return self._recorder.finish() if self._recorder else []


def progress_tracker(setup: Setup) -> ProgressTracker:
    """Of a process of this run, with room for as much as is to be noted."""
    if setup.config.logging.profile_ring:
        return ProgressTracker.with_work(rows_of_step(setup))
    return ProgressTracker.with_work() if _looks_for_stragglers(setup) else ProgressTracker()


def in_words(setup: Setup) -> list[str]:
    """What to say where stragglers were to be looked for, and are not."""
    if _looks_for_stragglers(setup) or not _wants_stragglers(setup):
        return []
    return [
        "stragglers       not looked for: on CUDA the device waits for transfers, and the host's clock says nothing"
    ]


def _wants_stragglers(setup: Setup) -> bool:
    return setup.grid.ring > 1 and setup.config.logging.straggler_threshold > 0


def _looks_for_stragglers(setup: Setup) -> bool:
    return _wants_stragglers(setup) and setup.device == "cpu"


class RingWatch:
    """A run's. Building it is collective, and so is every method; what is said is said on rank 0."""

    def __init__(self, setup: Setup, place: ProgressTracker):
        logging, self._last = setup.config.logging, setup.config.training.train_iters
        self._interval = logging.log_interval
        profiles, looks = logging.profile_ring, _looks_for_stragglers(setup)
        consensus = Consensus.build() if profiles or looks else None
        self._profile = Profile(setup, place, consensus) if profiles else None
        self._stragglers = (
            Stragglers(place, logging.straggler_threshold, consensus) if looks else None
        )
        self._began = 0

    def begin(self) -> None:
        """A step."""
        self._began = time.monotonic_ns()
        if self._profile:
            self._profile.begin()

    def end(self, step: int, seconds: float, data_seconds: float) -> RingReport:
        """What there is to say of the step, which took so long."""
        is_told = step % self._interval == 0 or step == self._last
        found, took = RingReport(), StepTime(step, self._began, seconds, data_seconds, is_told)
        if self._profile:
            found += self._profile.end(took)
        if self._stragglers:
            found += self._stragglers.end(took)
        return found

    def finish(self) -> list[str]:
        """What there is to say of the run."""
        return self._profile.finish() if self._profile else []
