"""What all ranks find out together before anything is built: that they run the same, with what, and from where."""

import atexit
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ring.checkpoint.lease import Lease, Owner, take
from megatron_ring.checkpoint.state import RunState
from megatron_ring.checkpoint.store import Stored
from megatron_ring.config import Config
from megatron_ring.data.dataset import Dataset
from megatron_ring.data.fingerprint import Fingerprint, fingerprint
from megatron_ring.monitoring import outputs
from megatron_ring.parallel.collective_errors import abort_collectively, run_checked
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.environment import Environment, slurm_job
from megatron_ring.parallel.grid import Coordinates
from megatron_ring.preflight.consistency import check_data, check_options_and_code
from megatron_ring.settings.setup import Setup
from megatron_ring.training import checkpointing


@dataclass(frozen=True)
class Start:
    """at: this process's place. stored: the checkpoint to go on from, None to start afresh. fingerprints: of the token
    stores that the run reads, as rank 0 sees them.

    lease: on the --save folder, held by global rank 0; None on other ranks, and without --save.
    reading: over which all ranks learn of data that one of them cannot read; for nothing else.
    """

    setup: Setup
    dataset: Dataset
    at: Coordinates
    stored: Stored | None
    fingerprints: list[Fingerprint]
    lease: Lease | None
    reading: Consensus

    @property
    def vocab_size(self) -> int:
        """V, the rows of the embedding."""
        return self.setup.config.model.vocabulary_size(self.dataset.tokenizer.vocab_size)

    @property
    def state(self) -> RunState:
        """Where the run is before its first step. Samples may be of another length than those counted before."""
        seq_length, end = self.setup.config.data.seq_length, self.dataset.tokenizer.end_of_document
        if self.stored:
            return replace(
                self.stored.state,
                seq_length=seq_length,
                end_of_document=end,
                data=self.fingerprints,
            )
        return RunState(
            0, 0, self.vocab_size, seq_length, end_of_document=end, data=self.fingerprints
        )

    @staticmethod
    def together(config: Config, environment: Environment, consensus: Consensus) -> "Start":
        """Raises on every rank, once all have left their groups, what is wrong on any. Collective; blocks."""
        rank = environment.global_rank
        with abort_collectively():
            check_options_and_code(config, consensus)
            setup = run_checked(consensus, lambda: Setup.of(config, environment.world_size))
            consensus.run_on_rank_zero(
                lambda: outputs.check(config.logging, config.checkpoint.save)
            )
            dataset = run_checked(
                consensus,
                lambda: Dataset.open(config.data, config.training.seed, progress=rank == 0),
            )
            check_data(config.data, consensus)
            fingerprints = consensus.run_on_rank_zero(
                lambda: [fingerprint(store) for store in dataset.prefixes]
            )
            lease = _lease(config, rank, consensus)
            start = Start(
                setup,
                dataset,
                setup.grid.coordinates(rank),
                None,
                fingerprints,
                lease,
                reading=consensus,
            )
            stored = checkpointing.find(setup, start.vocab_size, consensus, fingerprints)
        return replace(start, stored=stored, reading=Consensus.build())


def _lease(config: Config, rank: int, consensus: Consensus) -> Lease | None:
    """Take the lease on the --save folder for this run, on global rank 0, and release it when the process exits.

    Blocks for up to a minute where a run on another host may still hold the folder. Raises CheckpointError on every
    rank where another run holds it.
    """
    if not config.checkpoint.save:
        return None
    taken: list[Lease] = []
    consensus.run_on_rank_zero(
        lambda: taken.append(take(Path(config.checkpoint.save), Owner.here(*slurm_job()), _report))
    )
    for lease in taken:
        atexit.register(lease.release)
    return taken[0] if rank == 0 else None


def _report(line: str) -> None:
    print(line, flush=True)
