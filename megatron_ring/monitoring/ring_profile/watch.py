"""What the training loop tells of its steps to learn of its rings: who is slow always, the rest if asked for.

Stragglers are looked for wherever there is a ring, once per log interval. With --profile-ring every step has its
figures, and with --profile-ring-trace a few have a trace. None of it on CUDA, where the device waits for a transfer and
not the host: the host's moments say nothing there.
"""

import time

from megatron_ring.monitoring.ring_profile.profile import Profile, rows_of_step
from megatron_ring.monitoring.ring_profile.step import RingReport, StepTime
from megatron_ring.monitoring.ring_profile.straggler import Stragglers
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.progress import ProgressTracker
from megatron_ring.settings.setup import Setup


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
