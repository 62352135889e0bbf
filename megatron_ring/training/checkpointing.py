"""Saving and resuming: every rank writes the tensors that it holds, and rank 0 publishes them.

A checkpoint counts once all ranks have written theirs; an error on any rank is raised on all. Which
files there are and when they count is in ``checkpoint/store.py``, their content in
``checkpoint/tensors.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

from tqdm import tqdm

from megatron_ring.checkpoint import disk, names, retention, store, tensors
from megatron_ring.checkpoint.finite import NonFiniteTensor
from megatron_ring.checkpoint.lease import Lease
from megatron_ring.checkpoint.provenance import commit, now
from megatron_ring.checkpoint.selection import newest_checkpoint, with_checkpoint_error
from megatron_ring.checkpoint.state import FileRecord, RunState
from megatron_ring.checkpoint.tensors import Piece, Shapes, Tensors, Written
from megatron_ring.config import Config
from megatron_ring.engine.engine import Engine
from megatron_ring.errors import CheckpointError, Diverged, MegatronRingError
from megatron_ring.parallel.consensus import Consensus, run_checked
from megatron_ring.settings.run_settings import RunSettings

_MAX_PROBLEMS_SHOWN = 5


def resume(engine: Engine, stored: store.Stored, consensus: Consensus) -> None:
    """Load weights and optimizer state from a checkpoint written on any grid. Collective; blocks.

    Raises CheckpointError on every rank if one of them cannot read its part, or finds a value in it
    that is nan or infinite.
    """
    load = with_checkpoint_error(
        f"{stored.path} cannot be loaded",
        lambda: engine.load(Tensors.open(stored.path), stored.state),
    )
    try:
        run_checked(consensus, load)
    except NonFiniteTensor as error:
        problems = error.problems
        advice = consensus.run_on_rank_zero(lambda: _advice(stored.path, problems))
        raise CheckpointError(
            [f"{stored.path} cannot be resumed from:", *_shortened(problems), advice]
        ) from error
    engine.update_compute_weights()


def _advice(path: Path, problems: list[str]) -> str:
    """Return what to do about a checkpoint with non-finite tensors, which ``problems`` names."""
    others = names.checkpoints(path.parent) if names.is_checkpoint(path) else []
    older = [other for other in others if names.step_of(other) < names.step_of(path)]
    alternative = f"an older checkpoint, such as {older[0]}" if older else "another checkpoint"
    if any(f"{tensors.WEIGHT}/" in problem for problem in problems):
        return f"Set --load to {alternative}."
    return (
        f"Set --load to {alternative}. --finetune loads only the weights, and all that was read "
        "of them is finite"
    )


class Saver:
    """Writes the checkpoints of a run, one after another. Every method is collective.

    With --async-save a thread writes a copy in CPU memory while training continues. The ranks'
    threads communicate over a process group of their own, so that their messages do not mix with
    those of the main threads. As a context manager, it finishes a save in progress when all ranks
    end with a MegatronRingError.
    """

    def __init__(
        self,
        setup: RunSettings,
        consensus: Consensus,
        resumed_from: store.Stored | None = None,
        lease: Lease | None = None,
    ):
        """Prepare the saving of a run; collective.

        ``resumed_from``: the newest checkpoint of the run until it has written one itself.
        ``lease``: on the --save folder, checked by rank 0 before it writes there; None on other
        ranks.
        """
        self.consensus = consensus
        self._config = setup.config
        self._resumed_from = resumed_from
        self._lease = lease
        self._grid = ", ".join(
            f"{axis} {size}" for axis, size in setup.grid.sizes._asdict().items()
        )
        async_save = setup.config.checkpoint.async_save
        self._writer_consensus = Consensus.build() if async_save else consensus
        self._thread: Thread | None = None
        self._saved: Path | None = None
        self._error: BaseException | None = None

    @property
    def _folder(self) -> Path:
        return Path(self._config.checkpoint.save)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, MegatronRingError) and self._thread:
            try:
                self.finish()
            except MegatronRingError as save_error:
                raise type(error)([*error.problems, *save_error.problems]) from error

    def save(self, engine: Engine, state: RunState, delete_outdated: bool = True) -> None:
        """Write a checkpoint under --save, once the one before it is complete.

        Blocks until it is complete or, with --async-save, copied to CPU memory. With
        ``delete_outdated`` False no older checkpoint is deleted, and if there is one of the same
        step, nothing is written. Raises CheckpointError on every rank if any rank could not write
        this checkpoint or, with --async-save, the one before, whatever the error was; Diverged if
        tensors are not finite. Older checkpoints stay as they are.
        """
        self.finish()
        if self._resumed_from is None and self._saved is None:
            self.consensus.run_on_rank_zero(
                with_checkpoint_error("cannot move checkpoints", self._move_earlier_checkpoints)
            )
        path = names.final_path(self._folder, state.step)
        if not delete_outdated and self.consensus.run_on_rank_zero(path.exists):
            return
        state = replace(state, **engine.optimizer_counters(), processes=self._grid)
        shapes: Shapes = {}
        for of_rank in self.consensus.gather(engine.shapes):
            shapes |= of_rank
        save = _Save(
            folder=self._folder,
            state=state,
            shapes=shapes,
            config=self._config,
            delete_outdated=delete_outdated,
            consensus=self._writer_consensus,
            lease=self._lease,
        )
        if not self._config.checkpoint.async_save:
            self._saved = save.write(engine.pieces())
            return
        copy_to_cpu = with_checkpoint_error(
            save.failed, lambda: [piece.on_cpu() for piece in engine.pieces()]
        )
        pieces = run_checked(self.consensus, copy_to_cpu)
        self._thread = Thread(target=self._write, args=(save, pieces), name="save", daemon=True)
        self._thread.start()

    def _move_earlier_checkpoints(self) -> None:
        """Move the checkpoints of an earlier run to a sub-folder; this run started at step 0."""
        if self._lease:
            self._lease.check()
        with disk.write_errors(self._folder):
            if not self._folder.is_dir():
                return
            moved_to = retention.move_earlier_run(self._folder)
        if moved_to:
            tqdm.write(
                f"checkpoints      those of an earlier run in {self._folder} were moved to "
                f"{moved_to}"
            )

    def finish(self) -> Path | None:
        """Block until the last checkpoint is complete and return its folder, None without one.

        Raises what ``save`` would.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
            error = self._error
            self._error = None
            try:
                self.consensus.gather(lambda: _raise(error))
            except MegatronRingError as agreed:
                raise error or agreed  # noqa: B904 (this rank's own error has the cause)
        return self._saved

    def newest(self) -> Path | None:
        """Return the newest checkpoint of this run, complete, or else the one it resumed from."""
        own = self.finish()
        if own:
            return own
        return self._resumed_from.path if self._resumed_from else None

    def load_newest(self, engine: Engine) -> store.Stored:
        """Load the newest checkpoint that is still complete; there must be one.

        Raises as ``resume`` does.
        """
        stored = None
        if self.finish():
            stored = newest_checkpoint(self._config.checkpoint.save, self.consensus)
        stored = stored or self._resumed_from
        resume(engine, stored, self.consensus)
        return stored

    def _write(self, save: "_Save", pieces: list[Piece]) -> None:
        """Run in the thread. The main threads agree on its error in ``finish``."""
        try:
            self._saved = save.write(pieces)
        except MegatronRingError as error:
            self._error = error
        except BaseException as error:
            # A collective failed: the connection to another rank is lost, on all ranks' threads.
            self._error = CheckpointError(f"{save.failed}: {type(error).__name__}: {error}")
            self._error.__cause__ = error


@dataclass(frozen=True)
class _Save:
    """One checkpoint, written by all ranks together. An error on any rank is raised on all.

    lease: on the folder, on rank 0. Once another run has taken it over, nothing is published or
    deleted there, because the folder's content belongs to that run.
    """

    folder: Path
    state: RunState
    shapes: Shapes
    config: Config
    delete_outdated: bool
    consensus: Consensus
    lease: Lease | None = None

    @property
    def failed(self) -> str:
        """The beginning of the message of an unexpected error."""
        return f"cannot write the checkpoint of step {self.state.step} to {self.folder}"

    def write(self, pieces: list[Piece]) -> Path:
        """Write ``pieces``, and other ranks theirs; return the checkpoint's folder.

        Raises as Saver.save does.
        """
        folder = self.folder
        step = self.state.step
        partial = folder / names.partial_name(step)
        self._on_rank_zero(self._check_lease)
        self._on_rank_zero(lambda: store.prepare(folder, step))
        try:
            parts = self._on_all_ranks(lambda: self._write_part(partial, pieces))
            self._on_rank_zero(
                lambda: tensors.write_index(partial, self.shapes, tensors.KINDS, parts)
            )
            # Rank 0 lists the files for all ranks: on a shared disk another machine may see a new
            # file late in a listing, but it can always open it by its name.
            files = self._on_rank_zero(lambda: store.written(folder, step))
            own_files = files[self.consensus.rank :: self.consensus.ranks]
            records = self._on_all_ranks(lambda: store.flush_and_checksum(folder, step, own_files))
            self._on_rank_zero(self._check_lease)
            return self._on_rank_zero(lambda: self._publish(records))
        except MegatronRingError as error:
            newest = self._on_rank_zero(self._discard)
            if isinstance(error, NonFiniteTensor):
                problem = f"the checkpoint of step {step} is not written:"
                raise Diverged([problem, *_shortened(error.problems), newest]) from error
            raise CheckpointError([*error.problems, newest]) from error

    def _check_lease(self) -> None:
        if self.lease:
            self.lease.check()

    def _write_part(self, partial: Path, pieces: list[Piece]) -> list[Written]:
        """Write this rank's file and return its entries for the index."""
        try:
            return tensors.write_part(partial, self.consensus.rank, pieces)
        except NonFiniteTensor:
            raise
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.failed}: {error}. Free some space, or set --save to another disk."
            ) from error

    def _publish(self, records_by_rank: list[dict[str, FileRecord]]) -> Path:
        records: dict[str, FileRecord] = {}
        for of_rank in records_by_rank:
            records |= of_rank
        state = replace(self.state, commit=commit(), written_at=now())
        return store.commit(
            self.folder, state, self.config, records, self.delete_outdated, tqdm.write
        )

    def _discard(self) -> str:
        """Delete what was written; return a sentence about the checkpoint that is still newest."""
        if not (self.lease and self.lease.lost):
            store.discard(self.folder, self.state.step)
        try:
            newest = store.newest(self.folder)
        except CheckpointError as error:
            return str(error)
        if newest is None:
            return "There is no earlier checkpoint."
        return f"{newest.path.name} stays the newest."

    def _on_all_ranks(self, act: Callable[[], Any]) -> list[Any]:
        return self.consensus.gather(with_checkpoint_error(self.failed, act))

    def _on_rank_zero(self, act: Callable[[], Any]) -> Any:
        return self.consensus.run_on_rank_zero(with_checkpoint_error(self.failed, act))


def _raise(error: BaseException | None) -> None:
    if error:
        raise error


def _shortened(problems: list[str]) -> list[str]:
    """Return the first problems and, if there are more, how many."""
    more = len(problems) - _MAX_PROBLEMS_SHOWN
    shown = problems[:_MAX_PROBLEMS_SHOWN]
    return [*shown, f"and {more} more"] if more > 0 else shown
