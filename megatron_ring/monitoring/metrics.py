"""What a run tells: a line and a bar on the console, one JSON object a step in --metrics-file, the monitors.

The keys of the metrics file are a public interface. A step writes
``step, loss, grad_norm, lr, tokens, tokens_per_second, step_seconds``, the share of it spent waiting for data,
``data_seconds``, the operations of all ranks, ``model_flops`` (plan/flops.py), and of all steps so far how many were
bad and ``skipped_steps``, or led to ``roll_backs``; ``full_attention_flops`` is ``model_flops`` as published figures
count it, attention by the full square of a sample; a validation writes
``step, validation_loss, validation_bits_per_byte``, and the test, after the last step, ``step, test_loss,
test_bits_per_byte``. ``tokens`` counts all those read so far. Losses are nats per token. What is not finite is null in
the file, for JSON has no word for it, and what it is to the monitors. After a resume or a roll back
the file continues at the checkpoint's step (metrics_file.py); monitors keep the steps that are
repeated. Only global rank 0 reports.

Where there is a ring, the step that ends a log interval adds ``slowest_rank`` and ``slowest_over_mean``: who computed
longest in its hops since the last one, waits left out, over the ranks' mean for such work. With --profile-ring a step
adds ``attention_share, exposed_communication_share, data_share, optimizer_share`` of its seconds, means over all ranks
that do not overlap: the ring's passes but for waits; those waits, for Ulysses' trades and collectives outside of the
ring are in none; waiting for data; DeepSpeed's step, that is the norm, Adam and the gathering of weights, but not the
reduction of gradients, which is in none. And ``ring_hops``, an object for each ``direction`` and ``hop``, over all
layers and micro-batches: ``compute_seconds, wait_seconds, bytes`` sent, means over all ranks, and ``imbalance``, the
compute of the slowest rank over the mean of its ring, in the worst ring. ``missed_rows`` are notes that found no room
in the profile's log; there should be none. Monitors have all but ``ring_hops``.
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
from megatron_ring.monitoring.metrics_file import MetricsFile
from megatron_ring.monitoring.outputs import BestEffort
from megatron_ring.monitoring.ring_profile.report import RingReport

T = TypeVar("T")

Events = list[tuple[str, float, int]]
"""(name, value, step) each."""
Monitor = Callable[[Events], None]

# Steps whose speed the summary's medians are of: all of a shorter run, and as many at even
# distances of a longer one.
_KEPT_RATES = 4096
# The summary shows the first and the last; a roll back takes the last ones away.
_KEPT_VALIDATIONS = 256


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, in the order of the metrics file."""

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

    @property
    def figures(self) -> dict[str, Any]:
        """As the metrics file has them."""
        return {
            name: value for name, value in vars(self).items() if name != "ring"
        } | self.ring.figures

    def events(self) -> Events:
        """As the monitors have them, which take single numbers."""
        numbers = {
            name: value for name, value in self.figures.items() if isinstance(value, int | float)
        }
        return [
            (f"train/{name}", value, self.step) for name, value in numbers.items() if name != "step"
        ]


@dataclass(frozen=True)
class HeldOutRecord:
    """The loss after ``step`` on ``part`` of the text that is not trained on."""

    step: int
    part: Literal["validation", "test"]
    loss: float
    bits_per_byte: float

    def named(self, separator: str) -> dict[str, float]:
        """The figures, each under the name of its part and its own."""
        return {
            f"{self.part}{separator}{name}": getattr(self, name)
            for name in ("loss", "bits_per_byte")
        }


class Report(Protocol):
    """Whom the loop tells of its steps."""

    def step(self, record: StepRecord) -> None: ...

    def held_out(self, record: HeldOutRecord) -> None: ...

    def log(self, words: str) -> None: ...

    def flush(self) -> None: ...

    def rewind_to(self, step: int) -> None: ...


class NullReporter:
    """The report of every rank but the first."""

    def step(self, record: StepRecord) -> None:
        pass

    def held_out(self, record: HeldOutRecord) -> None:
        pass

    def log(self, words: str) -> None:
        pass

    def flush(self) -> None:
        pass

    def rewind_to(self, step: int) -> None:
        pass


class Thinned(Generic[T]):
    """Evenly spaced values of a series of any length, at most ``limit`` of them.

    They are the first value and every ``stride``-th after it.
    """

    def __init__(self, limit: int):
        self.limit, self.stride = limit, 1
        self.values: list[T] = []
        self._added = 0

    def add(self, value: T) -> None:
        if self._added % self.stride == 0:
            if len(self.values) == self.limit:
                del self.values[1::2]
                self.stride *= 2
            if self._added % self.stride == 0:
                self.values.append(value)
        self._added += 1


class ConsoleReport:
    """Reports to the console, the metrics file and the monitors.

    None of them ends the run if it fails. Its size does not depend on the number of steps.
    ``peak_flops``, of all processes, gives the utilisation; None: it is not known, and no
    utilisation is shown. ``monitors``: what takes events, by the name that a warning has of it.
    """

    def __init__(
        self,
        logging: LoggingConfig,
        steps: range,
        peak_flops: float | None,
        monitors: Mapping[str, Monitor],
    ):
        self.interval, self.monitors = logging.log_interval, monitors
        self.first_step, self.last_step = steps.start, steps.stop - 1
        self.peak_flops = peak_flops
        self.best_effort = BestEffort()
        path = logging.metrics_file
        self.metrics_file = MetricsFile(Path(path), self.log) if path else None
        self._on_metrics_file(lambda file: file.begin(steps.start - 1))
        self.first: StepRecord | None = None
        self.last: StepRecord | None = None
        self.validations: list[HeldOutRecord] = []
        self.rates: Thinned[tuple[float, float, float]] = Thinned(_KEPT_RATES)
        self.step_seconds: deque[float] = deque(maxlen=min(self.interval, _KEPT_RATES))
        # disable=None: no bar where there is no terminal; the lines are printed either way.
        self.bar = tqdm(
            total=self.last_step,
            initial=steps.start - 1,
            unit="step",
            disable=None,
            dynamic_ncols=True,
        )

    def step(self, record: StepRecord) -> None:
        self.first, self.last = self.first or record, record
        self.rates.add(_rates(record))
        self.step_seconds.append(record.step_seconds)
        self._on_metrics_file(lambda file: file.write(record.figures))
        self._monitor(record.events())
        self.bar.set_postfix_str(
            f"loss {record.loss:.3f}, {record.tokens_per_second:,.0f} tokens/s"
        )
        self.bar.update()
        if record.step % self.interval == 0 or record.step in (self.first_step, self.last_step):
            tqdm.write(self._line(record))
        for line in record.ring.lines:
            tqdm.write(line)

    def held_out(self, record: HeldOutRecord) -> None:
        if record.part == "validation":
            self.validations.append(record)
            del self.validations[1:-_KEPT_VALIDATIONS]
        self._on_metrics_file(lambda file: file.write({"step": record.step} | record.named("_")))
        self._monitor([(name, value, record.step) for name, value in record.named("/").items()])
        tqdm.write(
            f"step {record.step:>6}  {record.part} loss {record.loss:.4f}, {record.bits_per_byte:.4f} bits per byte"
        )
        if not math.isfinite(record.loss):
            self.log(
                f"the {record.part} loss is not finite, though no bad step has moved a weight: look at the text"
            )

    def log(self, words: str) -> None:
        """A line among those of the steps."""
        tqdm.write(words)

    def flush(self) -> None:
        """Put the metrics file on the disk: before a checkpoint, which must not be ahead of it."""
        self._on_metrics_file(MetricsFile.flush)

    def rewind_to(self, step: int) -> None:
        """Forget the steps after ``step``, from which the run goes on with other samples."""
        if self.first and self.first.step > step:
            self.first = None
        self.validations = [record for record in self.validations if record.step <= step]
        self._on_metrics_file(lambda file: file.rewind_to(step))
        self.bar.n = step
        self.bar.refresh()

    def close(self) -> str:
        """Take the bar down and return the summary."""
        self.bar.close()
        lines = []
        if self.first:
            first, last = self.first, self.last
            rate, own, usual = (statistics.median(rates) for rates in zip(*self.rates.values))
            lines.append(
                f"loss             {first.loss:.4f} -> {last.loss:.4f} in "
                f"{last.step - first.step + 1} steps, {last.tokens:,} tokens so far"
            )
            utilisation = self._utilisation(own, usual, ", {}")
            lines.append(f"speed            {rate:,.0f} tokens/s (median){utilisation}")
        if self.validations:
            first, last = (self.validations[i].bits_per_byte for i in (0, -1))
            lines.append(
                f"held-out text    {first:.4f} -> {last:.4f} bits per byte ({last / first - 1:+.0%})"
            )
        if self.first and self.last.skipped_steps + self.last.roll_backs:
            end = self.last
            lines.append(
                f"bad steps        {end.skipped_steps} skipped, {end.roll_backs} followed by a roll back"
            )
        for what, times in self.best_effort.failures.items():
            lines.append(f"warning          {what} failed {times} times")
        return "\n".join(lines)

    def _line(self, record: StepRecord) -> str:
        left = round((self.last_step - record.step) * statistics.median(self.step_seconds))
        return (
            f"step {record.step:>6}/{self.last_step}  loss {record.loss:.4f}  grad norm {record.grad_norm:.3f}  "
            f"lr {record.lr:.2e}  {record.tokens_per_second:,.0f} tokens/s"
            f"{self._utilisation(*_rates(record)[1:], ' ({})')}  ETA {left // 60}:{left % 60:02d}"
        )

    def _utilisation(self, own: float, usual: float, form: str) -> str:
        """Operations a second over what the processes could reach, by both conventions."""
        if not self.peak_flops:
            return ""
        own, usual = own / self.peak_flops, usual / self.peak_flops
        return form.format(f"{own:.0%} of peak, MFU {usual:.0%}")

    def _on_metrics_file(self, act: Callable[[MetricsFile], None]) -> None:
        if self.metrics_file:
            self.best_effort(f"--metrics-file {self.metrics_file.path}", act, self.metrics_file)

    def _monitor(self, events: Events) -> None:
        for name, write in self.monitors.items():
            self.best_effort(name, write, events)


def _rates(record: StepRecord) -> tuple[float, float, float]:
    """Per second: tokens, operations, and operations as published figures count them."""
    seconds = record.step_seconds
    return (
        record.tokens_per_second,
        record.model_flops / seconds,
        record.full_attention_flops / seconds,
    )
