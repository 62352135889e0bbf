"""Reporting of a run: console lines and progress bar, the metrics file, and monitors.

The keys of the metrics file are a public interface. It has one JSON object a line.

A training step writes ``step, loss, grad_norm, lr, tokens, tokens_per_second, step_seconds,
data_seconds, model_flops, skipped_steps, roll_backs, full_attention_flops``. Losses are nats per
token. ``tokens`` counts all tokens read so far. ``data_seconds`` is the part of ``step_seconds``
spent waiting for data. ``model_flops`` are the operations of all ranks (plan/flops.py);
``full_attention_flops`` counts them as published figures do, with attention over the full square of
a sample. ``skipped_steps`` and ``roll_backs`` count the bad steps so far that were skipped or
followed by a roll back.

Where samples are divided over data ranks and documents are kept apart, a step adds
``data_imbalance``, the attention work of the data rank with the most over the mean of the data
ranks, and ``data_imbalance_in_order``, what it would be with --sample-assignment in-order. With
--document-placement auto it adds ``placed_share``, the share of the first data rank's samples whose
documents are placed by size; the others keep the order of the layout.

A validation writes ``step, validation_loss, validation_bits_per_byte``. The test, after the last
step, writes ``step, test_loss, test_bits_per_byte``.

Where there is a ring, the step that ends a log interval adds ``slowest_rank`` and
``slowest_over_mean``: the rank with the longest compute time in its hops since the last interval,
waits excluded, and that time over the mean of the ranks, adjusted for its share of the work.

With --profile-ring a step adds ``attention_share, exposed_communication_share, data_share,
optimizer_share`` of its duration, averaged over all ranks. They do not overlap: the ring's passes
without waits; those waits; waiting for data; DeepSpeed's optimizer step, that is the norm, Adam and
gathering weights. Ulysses' all-to-alls, collectives outside the ring and the reduction of gradients
are in none of them. It also adds ``ring_hops``, an object for each ``direction`` and ``hop``, from
1, summed over all layers and micro-batches and averaged over all ranks: ``compute_seconds,
wait_seconds, bytes`` sent, and ``imbalance``, the compute time of the slowest rank over its ring's
mean, in the least balanced ring. ``missed_rows`` counts rows that did not fit into the profile's
log; there should be none.

On CUDA the times of hops and of the optimizer are those of the device: a hop computes from its
beginning in the stream of the step, gaps between kernels included, and waits while that stream
waits for a message. ``data_seconds`` is the host's; the device is idle meanwhile.

Non-finite values are null in the file, because JSON cannot express them, and are passed to monitors
as they are. Monitors receive everything but ``ring_hops``. After a resume or a roll back the file
continues at the checkpoint's step (metrics_file.py); monitors keep the steps that are repeated.
Only global rank 0 reports.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from tqdm import tqdm

from megatron_ring.config import LoggingConfig
from megatron_ring.errors import counted
from megatron_ring.monitoring.metrics_file import MetricsFile
from megatron_ring.monitoring.outputs import BestEffort
from megatron_ring.monitoring.ring_profile.report import RingReport

T = TypeVar("T")

Events = list[tuple[str, float, int]]
"""A list of (name, value, step)."""
Monitor = Callable[[Events], None]
_Rates = tuple[float, float, float]

# The steps whose speed the summary's medians use: all of a shorter run, and evenly spaced ones of a
# longer run.
_KEPT_RATES = 4096
# The summary shows the first and the last; a roll back removes the last ones.
_KEPT_VALIDATIONS = 256


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step; its fields are in the order of the metrics file, which has no None."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    tokens_per_second: float
    step_seconds: float
    data_seconds: float
    model_flops: float
    skipped_steps: int
    roll_backs: int
    full_attention_flops: float = 0.0
    ring: RingReport = field(default_factory=RingReport)
    data_imbalance: float | None = None
    data_imbalance_in_order: float | None = None
    placed_share: float | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        """The step's line in the metrics file."""
        own = {
            name: value
            for name, value in vars(self).items()
            if name != "ring" and value is not None
        }
        return own | self.ring.metrics

    def events(self) -> Events:
        """Return the step's events for monitors, which accept single numbers only."""
        return [
            (f"train/{name}", value, self.step)
            for name, value in self.metrics.items()
            if name != "step" and isinstance(value, int | float)
        ]


@dataclass(frozen=True)
class HeldOutRecord:
    """The loss after ``step`` on the validation or test part of the text."""

    step: int
    part: Literal["validation", "test"]
    loss: float
    bits_per_byte: float

    def prefixed(self, separator: str) -> dict[str, float]:
        """Return the values, each named by its part and its own name, joined by ``separator``."""
        return {
            f"{self.part}{separator}{name}": getattr(self, name)
            for name in ("loss", "bits_per_byte")
        }


class Reporter(Protocol):
    """The interface through which the training loop reports its steps."""

    def step(self, record: StepRecord) -> None:
        """Report an optimizer step."""

    def held_out(self, record: HeldOutRecord) -> None:
        """Report a validation or the test."""

    def log(self, message: str) -> None:
        """Print a line between those of the steps."""

    def flush(self) -> None:
        """Flush the metrics file to disk before a checkpoint, which must not be ahead of it."""

    def rewind_to(self, step: int) -> None:
        """Drop the steps after ``step``: the run continues from there with other samples."""


class NullReporter:
    """The reporter of every rank but 0: it discards everything."""

    def step(self, record: StepRecord) -> None:
        pass

    def held_out(self, record: HeldOutRecord) -> None:
        pass

    def log(self, message: str) -> None:
        pass

    def flush(self) -> None:
        pass

    def rewind_to(self, step: int) -> None:
        pass


class EvenlySampled(Generic[T]):
    """An evenly spaced subset of a series of any length, with at most ``limit`` values.

    It holds the first value and every ``stride``-th after it.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.stride = 1
        self.values: list[T] = []
        self._added = 0

    def add(self, value: T) -> None:
        """Append the next value of the series."""
        if self._added % self.stride == 0:
            if len(self.values) == self.limit:
                del self.values[1::2]
                self.stride *= 2
            if self._added % self.stride == 0:
                self.values.append(value)
        self._added += 1


class ConsoleReporter:
    """Reports to the console, the metrics file and the monitors.

    A failure of any of them does not end the run, and the memory used does not depend on the number
    of steps. peak_flops: peak FLOP/s of all processes together, for the utilisation;
    None: unknown, and no utilisation is shown. monitors: by the name that warnings use.
    """

    def __init__(
        self,
        logging: LoggingConfig,
        steps: range,
        peak_flops: float | None,
        monitors: Mapping[str, Monitor],
    ):
        self.interval = logging.log_interval
        self.monitors = monitors
        self.first_step = steps.start
        self.last_step = steps.stop - 1
        self.peak_flops = peak_flops
        self.best_effort = BestEffort()
        path = logging.metrics_file
        self.metrics_file = MetricsFile(Path(path), self.log) if path else None
        self._on_metrics_file(lambda file: file.begin(steps.start - 1))
        self.first: StepRecord | None = None
        self.last: StepRecord | None = None
        self.validations: list[HeldOutRecord] = []
        self.rates: EvenlySampled[_Rates] = EvenlySampled(_KEPT_RATES)
        self.step_seconds: deque[float] = deque(maxlen=min(self.interval, _KEPT_RATES))
        # disable=None: no bar without a terminal; the lines are printed in either case.
        self.bar = tqdm(
            total=self.last_step,
            initial=steps.start - 1,
            unit="step",
            disable=None,
            dynamic_ncols=True,
        )

    def step(self, record: StepRecord) -> None:
        """Report an optimizer step."""
        self.first = self.first or record
        self.last = record
        self.rates.add(_rates(record))
        self.step_seconds.append(record.step_seconds)
        self._on_metrics_file(lambda file: file.write(record.metrics))
        self._send_to_monitors(record.events())
        self.bar.set_postfix_str(
            f"loss {record.loss:.3f}, {record.tokens_per_second:,.0f} tokens/s"
        )
        self.bar.update()
        if record.step % self.interval == 0 or record.step in (self.first_step, self.last_step):
            tqdm.write(self._line(record))
        for line in record.ring.lines:
            tqdm.write(line)

    def held_out(self, record: HeldOutRecord) -> None:
        """Report a validation or the test."""
        if record.part == "validation":
            self.validations.append(record)
            del self.validations[1:-_KEPT_VALIDATIONS]
        self._on_metrics_file(lambda file: file.write({"step": record.step} | record.prefixed("_")))
        events = [(name, value, record.step) for name, value in record.prefixed("/").items()]
        self._send_to_monitors(events)
        self.log(
            f"step {record.step:>6}  {record.part} loss {record.loss:.4f}, "
            f"{record.bits_per_byte:.4f} bits per byte"
        )
        if not math.isfinite(record.loss):
            self.log(
                f"the {record.part} loss is not finite, although bad steps do not update the "
                f"weights: check the {record.part} text"
            )

    def log(self, message: str) -> None:
        """Print a line between those of the steps."""
        tqdm.write(message)

    def flush(self) -> None:
        """Flush the metrics file to disk before a checkpoint, which must not be ahead of it."""
        self._on_metrics_file(MetricsFile.flush)

    def rewind_to(self, step: int) -> None:
        """Drop the steps after ``step``: the run continues from there with other samples."""
        if self.first and self.first.step > step:
            self.first = None
        self.validations = [record for record in self.validations if record.step <= step]
        self._on_metrics_file(lambda file: file.rewind_to(step))
        self.bar.n = step
        self.bar.refresh()

    def close(self) -> str:
        """Close the progress bar and return the summary of the run."""
        self.bar.close()
        lines = []
        if self.first:
            first, last = self.first, self.last
            steps = last.step - first.step + 1
            lines.append(
                f"loss             {first.loss:.4f} -> {last.loss:.4f} in "
                f"{counted(steps, 'step')}, {last.tokens:,} tokens so far"
            )
            tokens, model_flops, full_flops = map(statistics.median, zip(*self.rates.values))
            utilisation = self._utilisation(model_flops, full_flops)
            lines.append(
                f"speed            {tokens:,.0f} tokens/s (median)"
                + (f", {utilisation}" if utilisation else "")
            )
        if self.validations:
            after = self.validations[-1].bits_per_byte
            line = f"held-out text    {after:.4f} bits per byte"
            if len(self.validations) > 1:
                before = self.validations[0].bits_per_byte
                line = (
                    f"held-out text    {before:.4f} -> {after:.4f} bits per byte "
                    f"({after / before - 1:+.0%})"
                )
            lines.append(line)
        if self.first and self.last.skipped_steps + self.last.roll_backs:
            lines.append(
                f"bad steps        {self.last.skipped_steps} skipped, "
                f"{self.last.roll_backs} followed by a roll back"
            )
        for output, times in self.best_effort.failures.items():
            lines.append(f"warning          {output} failed {times} times")
        return "\n".join(lines)

    def _line(self, record: StepRecord) -> str:
        steps_left = self.last_step - record.step
        seconds_left = round(steps_left * statistics.median(self.step_seconds))
        _, model_flops, full_flops = _rates(record)
        utilisation = self._utilisation(model_flops, full_flops)
        return (
            f"step {record.step:>6}/{self.last_step}  loss {record.loss:.4f}  "
            f"grad norm {record.grad_norm:.3f}  lr {record.lr:.2e}  "
            f"{record.tokens_per_second:,.0f} tokens/s"
            + (f" ({utilisation})" if utilisation else "")
            + f"  ETA {seconds_left // 60}:{seconds_left % 60:02d}"
        )

    def _utilisation(self, model_flops: float, full_flops: float) -> str:
        """Format FLOP/s over the peak FLOP/s, by both conventions; empty if unknown."""
        if not self.peak_flops:
            return ""
        of_peak = model_flops / self.peak_flops
        mfu = full_flops / self.peak_flops
        return f"{of_peak:.0%} of peak FLOP/s, MFU {mfu:.0%}"

    def _on_metrics_file(self, act: Callable[[MetricsFile], None]) -> None:
        if self.metrics_file:
            self.best_effort(f"--metrics-file {self.metrics_file.path}", act, self.metrics_file)

    def _send_to_monitors(self, events: Events) -> None:
        for name, write in self.monitors.items():
            self.best_effort(name, write, events)


def _rates(record: StepRecord) -> _Rates:
    """Return per second: tokens, operations, and operations with full attention."""
    seconds = record.step_seconds
    return (
        record.tokens_per_second,
        record.model_flops / seconds,
        record.full_attention_flops / seconds,
    )
