"""The training loop: steps, evaluations and checkpoints, counted in global steps and samples."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ring.context_parallel.placement import place_samples
from megatron_ring.data.dataset import bits_per_byte
from megatron_ring.data.loader import Batch
from megatron_ring.data.prefetch import Prefetcher
from megatron_ring.engine.engine import Engine, StepResult
from megatron_ring.monitoring.metrics import HeldOutRecord, Reporter, StepRecord
from megatron_ring.monitoring.ring_profile.monitor import RingMonitor
from megatron_ring.parallel.progress import ProgressTracker
from megatron_ring.plan.flops import full_attention_flops, training_flops
from megatron_ring.training.bad_steps import BadSteps, Guard
from megatron_ring.training.checkpointing import Saver
from megatron_ring.training.schedule import learning_rate
from megatron_ring.training.start import Part, Start
from megatron_ring.training.stopping import Stopping


@dataclass(frozen=True)
class StepOutcome:
    """A finished or refused step: its record for the report, its result and the samples it read."""

    record: StepRecord
    result: StepResult
    samples: range


class StepCounter:
    """Counts the steps after ``done`` up to ``last``; setting ``done`` continues after that."""

    def __init__(self, done: int, last: int):
        self.done = done
        self.last = last

    def __iter__(self) -> Iterator[int]:
        while self.done < self.last:
            self.done += 1
            yield self.done


def train(
    engine: Engine,
    start: Start,
    saver: Saver,
    report: Reporter,
    stopping: Stopping,
    progress: ProgressTracker,
    watch: RingMonitor,
) -> Path | None:
    """Train from the step of ``start`` to train_iters, or until a stop is requested, and save.

    Collective. Returns the folder of the last checkpoint. Raises DataError on every rank for data
    that one of them cannot read.
    """
    config = start.setup.config
    last_step = config.training.train_iters
    eval_interval = config.training.eval_interval if start.has("validation") else 0
    save_interval = config.checkpoint.save_interval
    guard = Guard(config.guards, start.state)
    bad_steps = BadSteps(engine, guard, saver, report)
    counter = StepCounter(start.state.step, last_step)
    if eval_interval > 0 and start.state.step == 0:
        report.held_out(evaluate("validation", engine, start, step=0))
    with saver, start.training_batches() as batches:
        for step in progress.track_steps(counter):
            outcome = run_step(engine, start, batches, step, watch, guard)
            report.step(outcome.record)
            if outcome.result.refused:
                counter.done = bad_steps.handle(step, outcome.result, outcome.samples)
                if counter.done < step:  # rolled back to a checkpoint
                    continue

            is_last = step == last_step
            if eval_interval > 0 and (is_last or step % eval_interval == 0):
                report.held_out(evaluate("validation", engine, start, step))
            if is_last and start.has("test"):
                report.held_out(evaluate("test", engine, start, step))

            stops = not is_last and stopping.requested(step)
            ends = is_last or stops
            save_is_due = save_interval > 0 and step % save_interval == 0
            if config.checkpoint.save and (ends or (save_is_due and guard.good_since_save)):
                state = replace(
                    start.state,
                    step=step,
                    consumed_samples=batches.consumed_samples,
                    **guard.state(),
                )
                report.flush()
                # Without a good step since the last checkpoint the weights are the same as in it:
                # then this one replaces no older one.
                saver.save(engine, state, delete_outdated=guard.good_since_save)
                guard.saved()
            elif config.checkpoint.save and save_is_due:
                report.log(
                    f"no checkpoint after step {step}: every step since the last one was bad"
                )
            if stops:
                break
    return saver.finish()


def run_step(
    engine: Engine, start: Start, batches: Prefetcher, step: int, watch: RingMonitor, guard: Guard
) -> StepOutcome:
    """Load data, run one optimizer step, measure it, and count it in ``guard``. Collective."""
    config = start.setup.config
    first_sample = batches.consumed_samples
    watch.begin()
    began = time.perf_counter()
    micro_batches = start.next_batches(batches)
    loaded = time.perf_counter()
    rate = learning_rate(step, config.training)
    result = engine.train_step(micro_batches, rate, guard.highest_loss)
    seconds = time.perf_counter() - began
    guard.count(result)
    imbalance = micro_batches[0].data_imbalance if micro_batches else None
    record = StepRecord(
        step=step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=rate,
        tokens=batches.consumed_samples * config.data.seq_length,
        tokens_per_second=start.setup.global_batch_size * config.data.seq_length / seconds,
        step_seconds=seconds,
        data_seconds=loaded - began,
        model_flops=_model_flops(engine, start, micro_batches),
        skipped_steps=guard.skipped_steps,
        roll_backs=guard.roll_backs,
        full_attention_flops=_full_attention_flops(start),
        ring=watch.end(step, seconds, loaded - began),
        data_imbalance=imbalance.assigned if imbalance else None,
        data_imbalance_in_order=imbalance.in_order if imbalance else None,
        placed_share=_placed_share(start, micro_batches),
    )
    return StepOutcome(record, result, range(first_sample, batches.consumed_samples))


def evaluate(part: Part, engine: Engine, start: Start, step: int) -> HeldOutRecord:
    """Evaluate the same samples of ``part`` every time: eval_iters global batches. Collective."""
    total = engine.evaluate(start.evaluation_batches(part), start.bytes_per_token)
    loss = total.loss_sum / max(1, total.tokens)
    return HeldOutRecord(step, part, loss, bits_per_byte(total.loss_sum, total.text_bytes))


def _model_flops(engine: Engine, start: Start, batches: list[Batch]) -> float:
    """Operations of the step on all ranks, counting only attention that document masks allow.

    nan on pipeline stages after the first, which have no batches. Rank 0, which reports, is on the
    first.
    """
    if not batches:
        return math.nan
    setup = start.setup
    lengths = torch.cat([batch.document_lengths(setup.layout.seq_length) for batch in batches])
    own = float(training_flops(setup.config.model, start.vocab_size, lengths))
    if not setup.config.data.reset_attention_mask:
        return own * setup.grid.data  # every data rank has the same
    total = engine.groups.sum(torch.tensor(own, dtype=torch.float64, device=engine.device))
    return total.item() / setup.grid.context


def _placed_share(start: Start, batches: list[Batch]) -> float | None:
    """Return the share of this data rank's samples of the step whose documents are placed by size.

    None where --document-placement is not auto, and on pipeline stages after the first.
    """
    layout = start.setup.layout
    if layout.placement is None or not batches:
        return None
    placements = [
        placement
        for batch in batches
        for placement in place_samples(batch.document_starts, len(batch.tokens_Bl), layout)
    ]
    return sum(placement is not None for placement in placements) / len(placements)


def _full_attention_flops(start: Start) -> float:
    """Operations of the step on all ranks by the usual convention for MFU (plan/flops.py)."""
    config = start.setup.config
    sequences = start.setup.global_batch_size
    return float(
        full_attention_flops(config.model, start.vocab_size, config.data.seq_length, sequences)
    )
