"""What a run tells: a line and a bar on the console, one JSON object a step in --metrics-file, the monitors.

The keys of the metrics file are a public interface. A step writes
``step, loss, grad_norm, lr, tokens, tokens_per_second, step_seconds``, the share of it spent waiting for data,
``data_seconds``, the operations of all ranks, ``model_flops`` (plan/flops.py), and of all steps so far how many were
bad and ``skipped_steps``, or led to ``roll_backs``; ``full_attention_flops`` is ``model_flops`` as published figures
count it, attention by the full square of a sample; a validation writes
``step, validation_loss, validation_bits_per_byte``, and the test, after the last step, ``step, test_loss,
test_bits_per_byte``. ``tokens`` counts all those read so far. Losses are nats per token. What is not finite is null in
the file, for JSON has no word for it, and what it is to the monitors. After a roll back the file goes on from the
checkpoint's step; monitors cannot take back what they were told. Only global rank 0 tells anything.

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

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm import tqdm

from megatron_ring.config import LoggingConfig
from megatron_ring.training.ring_profile.step import RingReport

Monitors = Callable[[list[tuple[str, float, int]]], None]


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
        return {name: value for name, value in vars(self).items() if name != "ring"} | self.ring.figures

    def events(self) -> list[tuple[str, float, int]]:
        """As the monitors have them, which take single numbers."""
        numbers = {name: value for name, value in self.figures.items() if isinstance(value, int | float)}
        return [(f"train/{name}", value, self.step) for name, value in numbers.items() if name != "step"]


@dataclass(frozen=True)
class HeldOutRecord:
    """The loss after ``step`` on ``part`` of the text that is not trained on."""

    step: int
    part: Literal["validation", "test"]
    loss: float
    bits_per_byte: float

    def named(self, separator: str) -> dict[str, float]:
        """The figures, each under the name of its part and its own."""
        return {f"{self.part}{separator}{name}": getattr(self, name) for name in ("loss", "bits_per_byte")}


def keep_until(metrics_file: Path, step: int) -> None:
    """Drop the lines behind ``step``: a run that goes on from there writes them again."""
    if not metrics_file.is_file():
        return
    lines = [line for line in metrics_file.read_text().splitlines() if json.loads(line)["step"] <= step]
    metrics_file.write_text("".join(f"{line}\n" for line in lines))


class Report(Protocol):
    """Whom the loop tells of its steps."""

    def step(self, record: StepRecord) -> None: ...

    def held_out(self, record: HeldOutRecord) -> None: ...

    def say(self, words: str) -> None: ...

    def back_to(self, step: int) -> None: ...


class Silence:
    """The report of every rank but the first."""

    def step(self, record: StepRecord) -> None:
        pass

    def held_out(self, record: HeldOutRecord) -> None:
        pass

    def say(self, words: str) -> None:
        pass

    def back_to(self, step: int) -> None:
        pass


class ConsoleReport:
    """Tells the console, the metrics file and the monitors. ``peak_flops``, of all processes, gives the utilisation.

    None: it is not known, and no utilisation is shown.
    """

    def __init__(self, logging: LoggingConfig, steps: range, peak_flops: float | None, monitors: Monitors):
        self.interval, self.monitors = logging.log_interval, monitors
        self.first_step, self.last_step = steps.start, steps.stop - 1
        self.peak_flops = peak_flops
        self.metrics_file = Path(logging.metrics_file) if logging.metrics_file else None
        if self.metrics_file:
            self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.first_step == 1
            keep_until(self.metrics_file, -1 if fresh else self.first_step - 1)
        self.steps: list[StepRecord] = []
        self.validations: list[HeldOutRecord] = []
        # disable=None: no bar where there is no terminal; the lines are printed either way.
        self.bar = tqdm(total=self.last_step, initial=steps.start - 1, unit="step", disable=None, dynamic_ncols=True)

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)
        self._write(record.figures)
        self.monitors(record.events())
        self.bar.set_postfix_str(f"loss {record.loss:.3f}, {record.tokens_per_second:,.0f} tokens/s")
        self.bar.update()
        if record.step % self.interval == 0 or record.step in (self.first_step, self.last_step):
            tqdm.write(self._line(record))
        for line in record.ring.lines:
            tqdm.write(line)

    def held_out(self, record: HeldOutRecord) -> None:
        if record.part == "validation":
            self.validations.append(record)
        self._write({"step": record.step} | record.named("_"))
        self.monitors([(name, value, record.step) for name, value in record.named("/").items()])
        tqdm.write(
            f"step {record.step:>6}  {record.part} loss {record.loss:.4f}, {record.bits_per_byte:.4f} bits per byte"
        )
        if not math.isfinite(record.loss):
            self.say(f"the {record.part} loss is not finite, though no bad step has moved a weight: look at the text")

    def say(self, words: str) -> None:
        """A line among those of the steps."""
        tqdm.write(words)

    def back_to(self, step: int) -> None:
        """Forget the steps behind ``step``, from which the run goes on with other samples."""
        self.steps = [record for record in self.steps if record.step <= step]
        self.validations = [record for record in self.validations if record.step <= step]
        if self.metrics_file:
            keep_until(self.metrics_file, step)
        self.bar.n = step
        self.bar.refresh()

    def close(self) -> str:
        """Take the bar down and return the summary."""
        self.bar.close()
        lines = []
        if self.steps:
            rate = statistics.median(record.tokens_per_second for record in self.steps)
            lines.append(
                f"loss             {self.steps[0].loss:.4f} -> {self.steps[-1].loss:.4f} in {len(self.steps)} steps, "
                f"{self.steps[-1].tokens:,} tokens so far"
            )
            lines.append(f"speed            {rate:,.0f} tokens/s (median){self._utilisation(self.steps, ', {}')}")
        if self.validations:
            first, last = (self.validations[i].bits_per_byte for i in (0, -1))
            lines.append(f"held-out text    {first:.4f} -> {last:.4f} bits per byte ({last / first - 1:+.0%})")
        if self.steps and (end := self.steps[-1]).skipped_steps + end.roll_backs:
            lines.append(f"bad steps        {end.skipped_steps} skipped, {end.roll_backs} followed by a roll back")
        return "\n".join(lines)

    def _line(self, record: StepRecord) -> str:
        recent = [r.step_seconds for r in self.steps[-self.interval :]]
        left = round((self.last_step - record.step) * statistics.median(recent))
        return (
            f"step {record.step:>6}/{self.last_step}  loss {record.loss:.4f}  grad norm {record.grad_norm:.3f}  "
            f"lr {record.lr:.2e}  {record.tokens_per_second:,.0f} tokens/s"
            f"{self._utilisation([record], ' ({})')}  ETA {left // 60}:{left % 60:02d}"
        )

    def _utilisation(self, steps: list[StepRecord], form: str) -> str:
        """The median step's operations a second over what the processes could reach, by both conventions."""
        if not self.peak_flops:
            return ""
        own, usual = (
            statistics.median(getattr(step, name) / step.step_seconds for step in steps) / self.peak_flops
            for name in ("model_flops", "full_attention_flops")
        )
        return form.format(f"{own:.0%} of peak, MFU {usual:.0%}")

    def _write(self, record: dict) -> None:
        if self.metrics_file:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps(_legal(record), allow_nan=False) + "\n")


def _legal(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _legal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_legal(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
