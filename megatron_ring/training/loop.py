"""The training loop: steps, validations and checkpoints, in global units, until the last iteration; then the test."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megatron_ring.data.dataset import bits_per_byte
from megatron_ring.data.loader import Batch, Loader
from megatron_ring.data.prefetch import Prefetcher
from megatron_ring.data.stages import LaterStageLoader, loader_of
from megatron_ring.data.stream import Stream
from megatron_ring.engine.engine import Engine, StepResult
from megatron_ring.monitoring.metrics import HeldOutRecord, Report, StepRecord
from megatron_ring.monitoring.ring_profile.watch import RingWatch
from megatron_ring.parallel.collective_errors import run_checked_each_step
from megatron_ring.parallel.progress import ProgressTracker
from megatron_ring.plan.flops import full_attention_flops, training_flops
from megatron_ring.training.bad_steps import BadSteps, Guard
from megatron_ring.training.checkpointing import Saver
from megatron_ring.training.schedule import learning_rate
from megatron_ring.training.start import Start
from megatron_ring.training.stopping import Stopping


@dataclass(frozen=True)
class StepOutcome:
    """A step that was taken, or was to be: what is told of it, what came of it, and which samples it has read."""

    record: StepRecord
    result: StepResult
    samples: range


class StepCounter:
    """The numbers of the steps behind ``done`` up to ``last``; who sets ``done`` has it go on from there."""

    def __init__(self, done: int, last: int):
        self.done, self.last = done, last

    def __iter__(self) -> Iterator[int]:
        while self.done < self.last:
            self.done += 1
            yield self.done


def train(
    engine: Engine,
    start: Start,
    saver: Saver,
    report: Report,
    stopping: Stopping,
    place: ProgressTracker,
    watch: RingWatch,
) -> Path | None:
    """Run the steps after ``start`` up to train_iters, or until ``stopping`` says so, and save; ``report`` is told all.

    Returns the last checkpoint's folder. Raises DataError on every rank for data that one of them cannot read.
    """
    training, saving, dataset = (
        start.setup.config.training,
        start.setup.config.checkpoint,
        start.dataset,
    )
    validates = training.eval_interval > 0 and dataset.validation is not None
    if validates and start.state.step == 0:
        report.held_out(held_out("validation", engine, start, step=0))
    guard = Guard(start.setup.config.guards, start.state)
    bad_steps = BadSteps(engine, guard, saver, report)
    with saver, Prefetcher(_loader(start, dataset.training, start.state.consumed_samples)) as ahead:
        for step in place.steps(course := StepCounter(start.state.step, training.train_iters)):
            taken = _step(engine, start, ahead, step, watch, guard)
            report.step(taken.record)
            if taken.result.refused:
                course.done = bad_steps.answer(step, taken.result, taken.samples)
                if course.done < step:
                    continue
            last = step == training.train_iters
            if validates and (last or step % training.eval_interval == 0):
                report.held_out(held_out("validation", engine, start, step))
            if last and dataset.test is not None:
                report.held_out(held_out("test", engine, start, step))
            stops = not last and stopping.agreed(step)
            ends, due = last or stops, saving.save_interval and step % saving.save_interval == 0
            if saving.save and (ends or (due and guard.good_since_save)):
                done = replace(
                    start.state, step=step, consumed_samples=ahead.consumed_samples, **guard.kept()
                )
                report.flush()
                # Without a good step since the last one the weights are those of the last one: none goes for it.
                saver.save(engine, done, retire=guard.good_since_save)
                guard.saved()
            elif saving.save and due:
                report.log(
                    f"no checkpoint after step {step}: every step since the last one was bad"
                )
            if stops:
                break
    return saver.finish()


def held_out(
    part: Literal["validation", "test"], engine: Engine, start: Start, step: int
) -> HeldOutRecord:
    """The loss on the same samples every time: the first eval_iters global batches of the part's stream."""
    dataset = start.dataset
    loader = _loader(start, getattr(dataset, part), consumed_samples=0)
    bytes_per_token = torch.from_numpy(dataset.tokenizer.bytes_per_token)
    global_batches = range(start.setup.config.training.eval_iters)
    batches = run_checked_each_step(
        start.reading, lambda: [loader.next_step() for _ in global_batches]
    )
    total = engine.evaluate(batches, bytes_per_token)
    loss = total.loss_sum / max(1, total.tokens)
    return HeldOutRecord(step, part, loss, bits_per_byte(total.loss_sum, total.text_bytes))


def _step(
    engine: Engine, start: Start, ahead: Prefetcher, step: int, watch: RingWatch, guard: Guard
) -> StepOutcome:
    setup, first = start.setup, ahead.consumed_samples
    watch.begin()
    began = time.perf_counter()
    batches = run_checked_each_step(start.reading, lambda: _next_batches(start, ahead))
    loaded = time.perf_counter()
    rate = learning_rate(step, setup.config.training)
    result = engine.train_step(batches, rate, guard.highest_loss)
    seconds = time.perf_counter() - began
    guard.count(result)
    record = StepRecord(
        step=step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=rate,
        tokens=ahead.consumed_samples * setup.config.data.seq_length,
        tokens_per_second=setup.global_batch_size * setup.config.data.seq_length / seconds,
        step_seconds=seconds,
        data_seconds=loaded - began,
        model_flops=_model_flops(engine, start, batches),
        skipped_steps=guard.skipped_steps,
        roll_backs=guard.roll_backs,
        full_attention_flops=_full_attention_flops(start),
        ring=watch.end(step, seconds, loaded - began),
    )
    return StepOutcome(record, result, range(first, ahead.consumed_samples))


def _next_batches(start: Start, ahead: Prefetcher) -> list[Batch]:
    """Return this rank's batches of the next step; on rank 0, end a run whose --save another run has taken over."""
    if start.lease:
        start.lease.raise_if_lost()
    return ahead.next_step()


def _model_flops(engine: Engine, start: Start, batches: list[Batch]) -> float:
    """Floating-point operations of the step on all ranks, counted from what its documents let tokens see.

    Known on the first pipeline stage, one of whose ranks reports it: later ones have no batches.
    """
    if not batches:
        return math.nan
    setup = start.setup
    lengths = torch.cat([batch.document_lengths(setup.layout.seq_length) for batch in batches])
    own = float(training_flops(setup.config.model, start.vocab_size, lengths))
    if not setup.config.data.reset_attention_mask:
        return own * setup.grid.data  # the same on every data rank
    return (
        engine.groups.sum(torch.tensor(own, dtype=torch.float64, device=engine.device)).item()
        / setup.grid.context
    )


def _full_attention_flops(start: Start) -> float:
    """The step's operations on all ranks as published figures count them."""
    config = start.setup.config
    sequences = start.setup.global_batch_size
    return float(
        full_attention_flops(config.model, start.vocab_size, config.data.seq_length, sequences)
    )


def _loader(start: Start, stream: Stream, consumed_samples: int) -> Loader | LaterStageLoader:
    setup = start.setup
    sizes = setup.config.training.micro_batch_size, setup.global_batch_size
    return loader_of(
        stream, start.dataset.packing, setup.layout, setup.grid, start.at, *sizes, consumed_samples
    )
