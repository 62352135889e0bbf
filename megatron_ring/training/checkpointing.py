"""Saving and resuming as one act of all ranks: each writes what it alone holds, rank 0 makes it the newest, or nobody.

Which files there are and when they count is ``checkpoint/store.py``'s; what is in them ``checkpoint/tensors.py``'s.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread

from megatron_ring.checkpoint import fit, names, store, tensors
from megatron_ring.checkpoint.lease import Lease
from megatron_ring.checkpoint.provenance import commit, now
from megatron_ring.checkpoint.state import FileRecord, RunState
from megatron_ring.checkpoint.tensors import Piece, Shapes, Tensors, Written
from megatron_ring.config import CheckpointConfig, Config
from megatron_ring.data.fingerprint import Fingerprint
from megatron_ring.errors import CheckpointError
from megatron_ring.parallel.agreement import Agreement
from megatron_ring.training.engine import Engine
from megatron_ring.training.setup import Setup


def find(
    setup: Setup, vocab_size: int, agreement: Agreement, fingerprints: Sequence[Fingerprint] = ()
) -> store.Stored | None:
    """The checkpoint to go on from, by --load; None to start afresh. The ranks read a share of its files each.

    With --finetune it is a new run's, of step 0, unless --save has one already. Raises CheckpointError on every rank
    when there is none to be had, or it is of another model, or of other data than ``fingerprints``, where there are
    any, without --allow-other-data. A new run from its weights may read any data.
    """
    folders = setup.config.checkpoint
    if not folders.load:
        return None
    agreement.on_rank_0(lambda: _check_there(folders))
    own = _newest(folders.save, agreement) if folders.finetune and folders.save else None
    stored, anew = own or _newest(folders.load, agreement), folders.finetune and own is None
    if anew and stored is None:
        raise CheckpointError(f"load {folders.load} holds no checkpoint to take weights from. Set --load.")
    if stored:
        agreement.on_rank_0(lambda: fit.check_same_model(stored, setup.config, vocab_size, tensors_alone=anew))
    if stored and fingerprints and not anew and not folders.allow_other_data:
        agreement.on_rank_0(lambda: fit.check_same_data(stored, fingerprints))
    return stored.for_new_run() if anew else stored


def resume(engine: Engine, stored: store.Stored) -> None:
    """Give ``engine`` the weights and the optimizer's state that a checkpoint of any grid has."""
    engine.load(Tensors.open(stored.path), stored.state)


class Saver:
    """Writes the checkpoints of a run, one after another. Every method is collective.

    With --async-save a thread writes copies that were taken aside, and training goes on meanwhile.
    """

    def __init__(
        self,
        setup: Setup,
        agreement: Agreement,
        begun_from: store.Stored | None = None,
        lease: Lease | None = None,
    ):
        """``begun_from``: the checkpoint that the run goes on from; until it has one of its own, the newest.

        ``lease``: on the --save folder, which rank 0 checks before it writes there; no other rank has one.
        """
        self._lease = lease
        self._config, self.agreement, self._begun_from = setup.config, agreement, begun_from
        self._processes = ", ".join(f"{axis} {size}" for axis, size in setup.grid.sizes._asdict().items())
        self._thread: Thread | None = None
        self._saved: Path | None = None
        self._fault: CheckpointError | None = None

    def save(self, engine: Engine, state: RunState) -> None:
        """Write a checkpoint under --save, once the one before it is whole. Blocks until it is, or is taken aside.

        Raises CheckpointError on every rank when any rank could not write this one or, taken aside, the one before;
        older ones stay as they are.
        """
        self.finish()
        state = replace(state, **engine.counters(), processes=self._processes)
        shapes = {name: shape for of_rank in self.agreement.on_all(engine.shapes) for name, shape in of_rank.items()}
        if self._config.checkpoint.async_save:
            taken_aside = [piece.on_cpu() for piece in engine.pieces()]
            self._thread = Thread(target=self._write, args=(taken_aside, shapes, state), name="save", daemon=True)
            self._thread.start()
        else:
            self._write(engine.pieces(), shapes, state)
            self.finish()

    def finish(self) -> Path | None:
        """Block until the last checkpoint is whole; its folder, if there is one. Raises what ``save`` would."""
        if self._thread:
            self._thread.join()
            self._thread = None
        fault, self._fault = self._fault, None
        if fault:
            raise fault
        return self._saved

    def newest(self) -> Path | None:
        """The newest checkpoint of this run, once it is whole: its own, or the one it was begun from."""
        return self.finish() or (self._begun_from.path if self._begun_from else None)

    def load_newest(self, engine: Engine) -> store.Stored:
        """Give ``engine`` what the newest checkpoint has that is still whole, as ``resume`` does; there must be one."""
        own = self.finish() and _newest(self._config.checkpoint.save, self.agreement)
        stored = own or self._begun_from
        resume(engine, stored)
        return stored

    def _write(self, pieces: list[Piece], shapes: Shapes, state: RunState) -> None:
        try:
            self._saved = _saved(pieces, shapes, state, self._config, self.agreement, self._lease)
        except CheckpointError as error:
            self._fault = error


def _saved(
    pieces: list[Piece], shapes: Shapes, state: RunState, config: Config, agreement: Agreement, lease: Lease | None
) -> Path:
    """Write a checkpoint, all ranks together; returns its folder. One rank's failure is raised on all.

    Raises CheckpointError on all ranks, too, when another run has taken ``lease`` over: then nothing is published, and
    nothing is deleted, since what lies there is the other's.
    """
    folder, step = Path(config.checkpoint.save), state.step
    partial = folder / names.partial_name(step)
    agreement.on_rank_0(lambda: _check(lease))
    agreement.on_rank_0(lambda: store.prepare(folder, step))
    try:
        parts = agreement.on_all(lambda: _part(partial, agreement.rank, pieces, step))
        agreement.on_rank_0(lambda: tensors.write_index(partial, shapes, tensors.KINDS, parts))
        sealed = _sealed(folder, step, agreement)
        agreement.on_rank_0(lambda: _check(lease))
        made = replace(state, commit=commit(), written_at=now())
        return agreement.on_rank_0(lambda: store.commit(folder, made, config, sealed))
    except CheckpointError as error:
        agreement.on_rank_0(lambda: None if lease and lease.lost else store.discard(folder, step))
        raise CheckpointError([*error.problems, agreement.on_rank_0(lambda: _what_stays(folder))]) from error


def _check(lease: Lease | None) -> None:
    if lease:
        lease.check()


def _part(partial: Path, rank: int, pieces: list[Piece], step: int) -> list[Written]:
    """This rank's file; what the index has to know of it."""
    try:
        return tensors.write_part(partial, rank, pieces)
    except CheckpointError as error:
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {partial.parent}: {error}. "
            "Free some space, or set --save to another disk."
        ) from error


def _sealed(folder: Path, step: int, agreement: Agreement) -> dict[str, FileRecord]:
    """The record of every file, which the ranks read back a share each; one rank's failure is raised on all.

    Rank 0 names the files, because a shared disk may show a new file to another machine late, but never under its name.
    """
    files = agreement.on_rank_0(lambda: store.written(folder, step))
    shares = agreement.on_all(lambda: store.seal(folder, step, files[agreement.rank :: agreement.ranks]))
    return {name: record for share in shares for name, record in share.items()}


def _what_stays(folder: Path) -> str:
    try:
        before = store.newest(folder)
    except CheckpointError as error:
        return str(error)
    return f"{before.path.name} stays the newest." if before else "There is none before it."


def _newest(folder: str, agreement: Agreement) -> store.Stored | None:
    """``store.newest``, the reading shared out; what is there is what rank 0 sees."""
    candidates, skipped = agreement.on_rank_0(lambda: names.candidates(Path(folder)))
    return store.first_whole(Path(folder), candidates, skipped, lambda path: _verify(path, agreement))


def _check_there(config: CheckpointConfig) -> None:
    if not Path(config.load).is_dir() and config.load != config.save:
        raise CheckpointError(f"load {config.load} does not exist. Set --load, or leave it out to start afresh.")


def _verify(path: Path, agreement: Agreement) -> RunState:
    """``store.verify``, the files shared out, the largest first."""
    state, files = agreement.on_rank_0(lambda: store.described(path))
    ordered = sorted(files, key=lambda name: (-files[name].bytes, name))
    share = {name: files[name] for name in ordered[agreement.rank :: agreement.ranks]}
    agreement.on_all(lambda: store.check(path, share))
    return state
