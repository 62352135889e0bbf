"""Where a run starts, agreed on by all ranks: setup, data, and the checkpoint to resume from."""

import atexit
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megatron_ring.checkpoint.lease import Lease, Owner, take
from megatron_ring.checkpoint.selection import with_checkpoint_error
from megatron_ring.checkpoint.state import RunState
from megatron_ring.checkpoint.store import Stored, read_config
from megatron_ring.config import Config, TrainingConfig
from megatron_ring.data.dataset import Dataset
from megatron_ring.data.loader import Batch, LaterStageLoader, Loader, build_loader
from megatron_ring.data.prefetch import Prefetcher
from megatron_ring.data.store_fingerprint import Fingerprint, fingerprint
from megatron_ring.data.stream import Stream
from megatron_ring.engine.extra_keys import resolve_settings
from megatron_ring.errors import ConfigError
from megatron_ring.monitoring import outputs
from megatron_ring.parallel.consensus import (
    Consensus,
    abort_collectively,
    run_checked,
    run_checked_each_step,
)
from megatron_ring.parallel.environment import Environment, slurm_job
from megatron_ring.parallel.grid import Coordinates
from megatron_ring.preflight.consistency import check_data, check_layout, check_options_and_code
from megatron_ring.settings.run_settings import RunSettings
from megatron_ring.training.checkpoint_selection import select_checkpoint
from megatron_ring.training.schedule import Schedule

Part = Literal["validation", "test"]
"""A part of the data that is not trained on."""


@dataclass(frozen=True)
class Start:
    """What a run starts with, and access to its data.

    coordinates: this process's position in the grid. stored: the checkpoint to resume from, None
    for a run from step 0. fingerprints: of the token stores that the run reads, as rank 0 sees
    them. lease: on the --save folder, held by global rank 0; None on other ranks, and without
    --save. data_consensus: used only to raise data errors of one rank on all. schedule: the warm-up
    and min_lr, which setup.config has instead of auto, and the reasons.
    """

    setup: RunSettings
    dataset: Dataset
    coordinates: Coordinates
    stored: Stored | None
    fingerprints: list[Fingerprint]
    lease: Lease | None
    data_consensus: Consensus
    schedule: Schedule

    @property
    def vocab_size(self) -> int:
        """V, the rows of the embedding."""
        return self.setup.config.model.vocabulary_size(self.dataset.tokenizer.vocab_size)

    @property
    def state(self) -> RunState:
        """The run's state before its first step.

        After a resume with another seq_length, consumed samples were counted in the old one.
        """
        own = {
            "seq_length": self.setup.config.data.seq_length,
            "end_of_document": self.dataset.tokenizer.end_of_document,
            "data": self.fingerprints,
        }
        if self.stored:
            return replace(self.stored.state, **own)
        return RunState(step=0, consumed_samples=0, vocab_size=self.vocab_size, **own)

    @property
    def bytes_per_token(self) -> torch.Tensor:
        """(V,): the bytes of text of each token id."""
        return torch.from_numpy(self.dataset.tokenizer.bytes_per_token)

    def has(self, part: Part) -> bool:
        """Return whether --split leaves any data for ``part``."""
        return getattr(self.dataset, part) is not None

    def training_batches(self) -> Prefetcher:
        """Return the training data from the run's first step on, loaded ahead by a thread."""
        return Prefetcher(self._loader(self.dataset.training, self.state.consumed_samples))

    def next_batches(self, training_batches: Prefetcher) -> list[Batch]:
        """Return this rank's micro-batches of the next training step; blocks until all have theirs.

        Raises on every rank if one cannot read its data, or if another run has taken over --save.
        """

        def read() -> list[Batch]:
            if self.lease:
                self.lease.raise_if_lost()
            return training_batches.next_step()

        return run_checked_each_step(self.data_consensus, read)

    def evaluation_batches(self, part: Part) -> list[list[Batch]]:
        """Return the first eval_iters global batches of ``part``, the same on every call.

        Blocks until all ranks have theirs. Raises on every rank if one cannot read its data.
        """
        loader = self._loader(getattr(self.dataset, part), consumed_samples=0)
        global_batches = range(self.setup.config.training.eval_iters)
        return run_checked_each_step(
            self.data_consensus, lambda: [loader.next_step() for _ in global_batches]
        )

    def _loader(self, stream: Stream, consumed_samples: int) -> Loader | LaterStageLoader:
        setup = self.setup
        return build_loader(
            stream,
            self.dataset.boundaries,
            setup.layout,
            setup.grid,
            self.coordinates,
            setup.config.training.micro_batch_size,
            setup.global_batch_size,
            consumed_samples,
            assigns_by_work=setup.config.data.sample_assignment == "by-work",
            window=setup.config.model.window_of_all_layers,
        )

    @staticmethod
    def build(config: Config, environment: Environment, consensus: Consensus) -> "Start":
        """Check options, code, data and checkpoint on all ranks. Collective; blocks.

        Raises a problem of any rank on every rank, after all have left their groups.
        """
        rank = environment.global_rank

        def check_outputs() -> None:
            outputs.check_outputs(config.logging, config.checkpoint.save)

        def open_data() -> Dataset:
            return Dataset.open(config.data, config.training.seed, progress=rank == 0)

        with abort_collectively():
            check_options_and_code(config, consensus)
            setup = run_checked(consensus, lambda: resolve_settings(config, environment.world_size))
            check_layout(setup.layout, consensus)
            consensus.run_on_rank_zero(check_outputs)
            dataset = run_checked(consensus, open_data)
            check_data(config.data, consensus)
            fingerprints = consensus.run_on_rank_zero(
                lambda: [fingerprint(store) for store in dataset.prefixes]
            )
            lease = _take_lease(config, rank, consensus)
            vocab_size = config.model.vocabulary_size(dataset.tokenizer.vocab_size)
            stored = select_checkpoint(setup, vocab_size, consensus, fingerprints)
            schedule = resolve_schedule(config.training, stored, consensus)
        training = schedule.applied_to(config.training)
        return Start(
            setup=replace(setup, config=replace(config, training=training)),
            dataset=dataset,
            coordinates=setup.grid.coordinates(rank),
            stored=stored,
            fingerprints=fingerprints,
            lease=lease,
            data_consensus=Consensus.build(),
            schedule=schedule,
        )


def resolve_schedule(
    config: TrainingConfig, stored: Stored | None, consensus: Consensus
) -> Schedule:
    """Resolve the schedule of a run that resumes from ``stored``, if any. Collective; blocks.

    With auto, warm-up and min_lr of the checkpoint are kept, unless no step has been taken. Raises
    ConfigError on every rank if they do not fit the other options, as a warm-up that leaves no
    steps for the decay until --lr-decay-iters.
    """
    then = None
    has_auto = "auto" in (config.lr_warmup_iters, config.min_lr)
    if stored and stored.state.step > 0 and has_auto:
        read = with_checkpoint_error(
            f"{stored.path} cannot be read", lambda: read_config(stored.path).training
        )
        then = consensus.run_on_rank_zero(read)
    schedule = Schedule.of(config, then)
    # A run that ends within the warm-up of its checkpoint has no decay, which is no contradiction.
    if config.lr_decay_iters:
        problems = schedule.applied_to(config).problems()
        if problems:
            raise ConfigError(problems)
    return schedule


def _take_lease(config: Config, rank: int, consensus: Consensus) -> Lease | None:
    """Take the lease on the --save folder, on global rank 0, and release it when the process exits.

    Blocks for up to a minute if a run on another host may still hold the folder. Raises
    CheckpointError on every rank if another run holds it.
    """
    if not config.checkpoint.save:
        return None
    leases: list[Lease] = []

    def take_lease() -> None:
        leases.append(take(Path(config.checkpoint.save), Owner.here(*slurm_job()), _print))

    consensus.run_on_rank_zero(take_lease)
    for lease in leases:
        atexit.register(lease.release)
    return leases[0] if rank == 0 else None


def _print(line: str) -> None:
    print(line, flush=True)
