"""The training loop's entry to ring profiling: straggler detection and, on request, the profile.

Stragglers are detected wherever there is a ring, once per log interval. With --profile-ring every
step has its metrics, and with --profile-ring-trace a few steps have a trace.

On a CPU the host's clock times all this. On CUDA the device waits for transfers and not the host,
so events in its stream do (parallel/device_clock.py); they are read after the training step, which
ends with a synchronisation of its own (docs/decisions/0014).
"""

import time
from typing import Any

from megatron_ring.monitoring.ring_profile.hop_statistics import (
    StepSums,
    pack_sums,
    step_metrics,
    sum_log,
    summary_line,
)
from megatron_ring.monitoring.ring_profile.recording import TraceRecorder
from megatron_ring.monitoring.ring_profile.report import (
    RingReport,
    StepTime,
    gather_to_rank_zero,
)
from megatron_ring.monitoring.ring_profile.stragglers import StragglerDetector
from megatron_ring.monitoring.ring_profile.trace import StepLog
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.device_clock import DeviceClock
from megatron_ring.parallel.grid import layers_of_stage
from megatron_ring.parallel.progress import ProgressTracker
from megatron_ring.parallel.ring_log import WORK_EVENTS, Event
from megatron_ring.settings.run_settings import RunSettings

# Log rows of a hop: its start and source, and for each of two transfers a post, a completion and up
# to four waits of two rows.
_ROWS_PER_HOP = 2 + 2 * (2 + 4 * 2)
_ROWS_PER_PASS = 2
_ROWS_PER_OPTIMIZER_STEP = 2


def build_progress_tracker(setup: RunSettings) -> ProgressTracker:
    """Return this process's progress tracker, with room for what the options record."""
    profiles = setup.config.logging.profile_ring
    if not (profiles or _detects_stragglers(setup)):
        return ProgressTracker()
    if setup.device == "cpu":
        return ProgressTracker.with_work(max_rows_per_step(setup) if profiles else 0)
    logged = frozenset(Event) if profiles else WORK_EVENTS
    return ProgressTracker.with_work(max_rows_per_step(setup), DeviceClock(logged))


def max_rows_per_step(setup: RunSettings) -> int:
    """Return an upper bound of the rows that a process logs in a step.

    Each layer's ring runs forward and backward, and once more where attention is recomputed.
    """
    config = setup.config
    layers = len(layers_of_stage(config.model.num_layers, setup.grid.pipe, 0))
    passes_per_layer = 2 + config.memory.recompute_attention
    passes = passes_per_layer * layers * setup.micro_batches
    rows_per_pass = _ROWS_PER_PASS + setup.grid.ring * _ROWS_PER_HOP
    return passes * rows_per_pass + _ROWS_PER_OPTIMIZER_STEP


def _detects_stragglers(setup: RunSettings) -> bool:
    return setup.grid.ring > 1 and setup.config.logging.straggler_threshold > 0


class RingMonitor:
    """Collects what the options of a run record about its ring.

    The constructor and every method are collective over all processes; only rank 0 reports.
    """

    def __init__(self, setup: RunSettings, progress: ProgressTracker):
        logging = setup.config.logging
        self._progress = progress
        self._ring_size = setup.grid.ring
        self._last_step = setup.config.training.train_iters
        self._log_interval = logging.log_interval
        self._profile: _Profile | None = None
        self._stragglers: StragglerDetector | None = None
        detects_stragglers = _detects_stragglers(setup)
        if logging.profile_ring or detects_stragglers:
            consensus = Consensus.build()
            if logging.profile_ring:
                self._profile = _Profile(setup, progress, consensus)
            if detects_stragglers:
                threshold = logging.straggler_threshold
                self._stragglers = StragglerDetector(progress, threshold, consensus)
        self._began = 0

    def begin(self) -> None:
        """Mark the start of a step."""
        self._began = time.monotonic_ns()
        self._progress.begin_step()

    def end(self, step: int, seconds: float, data_seconds: float) -> RingReport:
        """Return the report on a step that took ``seconds``, ``data_seconds`` of them for data.

        On CUDA the stream must have been synchronised since the step's last work.
        """
        rows = self._progress.end_step()
        sums = sum_log(rows, self._ring_size)
        if self._progress.clock:
            self._progress.add_device_time(sums.compute_2R.sum())
        ends_log_interval = step % self._log_interval == 0 or step == self._last_step
        timing = StepTime(step, self._began, seconds, data_seconds, ends_log_interval)
        report = RingReport()
        if self._profile:
            report += self._profile.end(StepLog(timing, rows), sums)
        if self._stragglers:
            report += self._stragglers.end(timing)
        return report

    def finish(self) -> list[str]:
        """Return the console lines at the end of the run."""
        return self._profile.finish() if self._profile else []


class _Profile:
    """Implements --profile-ring: gathers every step's sums and records the steps of the trace.

    ``progress`` has a log. Every method is collective over all processes.
    """

    def __init__(self, setup: RunSettings, progress: ProgressTracker, consensus: Consensus):
        logging = setup.config.logging
        self._log = progress.log
        self._consensus = consensus
        self._rings = setup.grid.members("ring")
        self._recorder: TraceRecorder | None = None
        if logging.profile_ring_trace:
            self._recorder = TraceRecorder(
                logging.profile_ring_trace, logging.profile_ring_steps, consensus
            )
        self._unreported: list[dict[str, Any]] = []

    def end(self, log: StepLog, sums: StepSums) -> RingReport:
        timing = log.time
        own = pack_sums(sums, self._log.missed, timing.seconds, timing.data_seconds)
        packed = gather_to_rank_zero(own, self._consensus)
        lines = self._recorder.add(log) if self._recorder else []
        if packed is None:
            return RingReport()
        metrics = step_metrics(packed, self._rings)
        self._unreported.append(metrics)
        if timing.ends_log_interval:
            lines = [summary_line(self._unreported), *lines]
            self._unreported = []
        return RingReport(metrics, lines)

    def finish(self) -> list[str]:
        return self._recorder.finish() if self._recorder else []
