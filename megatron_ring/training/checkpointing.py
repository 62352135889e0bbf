"""Saving and resuming as one act of all ranks: each writes what it alone holds, rank 0 makes it the newest, or nobody.

Which files there are and when they count is ``checkpoint/store.py``'s; what is in them ``checkpoint/tensors.py``'s.
"""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

from megatron_ring.checkpoint import disk, fit, formats, names, retention, store, tensors
from megatron_ring.checkpoint.finite import NotFinite
from megatron_ring.checkpoint.lease import Lease
from megatron_ring.checkpoint.provenance import commit, now
from megatron_ring.checkpoint.state import FileRecord, RunState
from megatron_ring.checkpoint.tensors import Piece, Shapes, Tensors, Written
from megatron_ring.config import CheckpointConfig, Config
from megatron_ring.data.fingerprint import Fingerprint
from megatron_ring.engine.engine import Engine
from megatron_ring.errors import CheckpointError, Diverged, MegatronRingError
from megatron_ring.parallel.collective_errors import run_checked
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.settings.setup import Setup

Got = TypeVar("Got")


def find(
    setup: Setup, vocab_size: int, consensus: Consensus, fingerprints: Sequence[Fingerprint] = ()
) -> store.Stored | None:
    """The checkpoint to go on from, by --load; None to start afresh. The ranks read a share of its
    files each.

    --load names a checkpoint, which is then the one, or a folder of them, of which the newest whole
    one is taken. With --finetune it is a new run's, of step 0, unless --save has one already; such
    a run may read any data. Raises CheckpointError on every rank when there is none to be had, or
    it is of another model or another program, or of other data than ``fingerprints``, where there
    are any, without --allow-other-data.
    """
    folders = setup.config.checkpoint
    if not folders.load:
        return None
    itself = consensus.run_on_rank_zero(
        _any_error(f"load {folders.load} cannot be read", lambda: _names_one(folders))
    )
    own = _newest(folders.save, consensus) if folders.finetune and folders.save else None
    anew = folders.finetune and own is None
    stored = own or (_exactly if itself else _newest)(folders.load, consensus)
    if anew and stored is None:
        raise CheckpointError(
            f"load {folders.load} holds no checkpoint to take weights from. Set --load."
        )
    if stored:
        check = lambda: fit.check_same_model(stored, setup.config, vocab_size, tensors_alone=anew)  # noqa: E731
        consensus.run_on_rank_zero(_any_error(f"{stored.path} cannot be read", check))
    if stored and fingerprints and not anew and not folders.allow_other_data:
        consensus.run_on_rank_zero(lambda: fit.check_same_data(stored, fingerprints))
    return stored.for_new_run() if anew else stored


def resume(engine: Engine, stored: store.Stored, consensus: Consensus) -> None:
    """Give ``engine`` the weights and the optimizer's state that a checkpoint of any grid has.
    Collective; blocks.

    Raises CheckpointError on every rank where one of them cannot read its part, or finds a value in
    it that is nan or infinite.
    """
    read = _any_error(
        f"{stored.path} cannot be loaded",
        lambda: engine.load(Tensors.open(stored.path), stored.state),
    )
    try:
        run_checked(consensus, read)
    except NotFinite as fault:
        problems = fault.problems
        advice = consensus.run_on_rank_zero(lambda: _advice(stored.path, problems))
        raise CheckpointError(
            [f"{stored.path} is not fit to go on from:", *_first(problems), advice]
        ) from fault
    engine.update_compute_weights()


class Saver:
    """Writes the checkpoints of a run, one after another. Every method is collective.

    With --async-save a thread writes copies that were taken aside, and training goes on meanwhile.
    What the ranks' threads agree on goes over a process group of their own, so that it never meets
    what the main threads agree on. Within ``with``, a save that is on its way when all ranks end
    with an error of the user's is finished first.
    """

    def __init__(
        self,
        setup: Setup,
        consensus: Consensus,
        begun_from: store.Stored | None = None,
        lease: Lease | None = None,
    ):
        """``begun_from``: the checkpoint that the run goes on from; until it has one of its own,
        the newest.

        ``lease``: on the --save folder, which rank 0 checks before it writes there; no other rank
        has one.
        """
        self._lease = lease
        self._config, self.consensus, self._begun_from = setup.config, consensus, begun_from
        self._processes = ", ".join(
            f"{axis} {size}" for axis, size in setup.grid.sizes._asdict().items()
        )
        self._writing = Consensus.build() if setup.config.checkpoint.async_save else consensus
        self._thread: Thread | None = None
        self._saved: Path | None = None
        self._fault: BaseException | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, MegatronRingError) and self._thread:
            try:
                self.finish()
            except MegatronRingError as fault:
                raise type(error)([*error.problems, *fault.problems]) from error

    def save(self, engine: Engine, state: RunState, retire: bool = True) -> None:
        """Write a checkpoint under --save, once the one before it is whole. Blocks until it is, or
        is taken aside.

        With ``retire`` false no older checkpoint is deleted for it, and none of the same step
        replaced: then it is not written. Raises CheckpointError on every rank when any rank could
        not write this one or, taken aside, the one before, whatever the error was; Diverged where
        its tensors are not finite. Older ones stay as they are.
        """
        self.finish()
        if self._begun_from is None and self._saved is None:
            self.consensus.run_on_rank_zero(
                _any_error("cannot set checkpoints aside", self._set_earlier_aside)
            )
        final = names.final_path(Path(self._config.checkpoint.save), state.step)
        if not retire and self.consensus.run_on_rank_zero(final.exists):
            return
        state = replace(state, **engine.optimizer_state(), processes=self._processes)
        shapes = {
            name: shape
            for of_rank in self.consensus.gather(engine.shapes)
            for name, shape in of_rank.items()
        }
        folder = Path(self._config.checkpoint.save)
        save = _Save(folder, state, shapes, self._config, retire, self._writing, self._lease)
        if self._config.checkpoint.async_save:
            copied = run_checked(
                self.consensus,
                _any_error(save.failed, lambda: [p.on_cpu() for p in engine.pieces()]),
            )
            self._thread = Thread(target=self._write, args=(save, copied), name="save", daemon=True)
            self._thread.start()
        else:
            self._saved = save.write(engine.pieces())

    def _set_earlier_aside(self) -> None:
        """Keep the checkpoints of an earlier run: this one started from step 0 in the same folder."""
        folder = Path(self._config.checkpoint.save)
        if self._lease:
            self._lease.check()
        with disk.write_errors(folder):
            if folder.is_dir() and (aside := retention.set_aside_earlier(folder)):
                tqdm.write(
                    f"checkpoints      those of an earlier run in {folder} are in {aside} now"
                )

    def finish(self) -> Path | None:
        """Block until the last checkpoint is whole; its folder, if there is one. Raises what ``save`` would."""
        if self._thread:
            self._thread.join()
            self._thread = None
            fault, self._fault = self._fault, None
            try:
                self.consensus.gather(lambda: _raise(fault))
            except MegatronRingError as agreed:
                raise fault or agreed  # noqa: B904 (its own error has the cause)
        return self._saved

    def newest(self) -> Path | None:
        """The newest checkpoint of this run, once it is whole: its own, or the one it was begun from."""
        return self.finish() or (self._begun_from.path if self._begun_from else None)

    def load_newest(self, engine: Engine) -> store.Stored:
        """Give ``engine`` what the newest checkpoint has that is still whole, as ``resume`` does; there must be one."""
        own = self.finish() and _newest(self._config.checkpoint.save, self.consensus)
        stored = own or self._begun_from
        resume(engine, stored, self.consensus)
        return stored

    def _write(self, save: "_Save", pieces: list[Piece]) -> None:
        """The thread. What it raises is agreed on by the main threads, in ``finish``."""
        try:
            self._saved = save.write(pieces)
        except MegatronRingError as error:
            self._fault = error
        except BaseException as error:
            # From a collective, not from an act: the connection to another rank is lost, which all
            # threads learn of.
            self._fault = CheckpointError(f"{save.failed}: {type(error).__name__}: {error}")
            self._fault.__cause__ = error


@dataclass(frozen=True)
class _Save:
    """One checkpoint that all ranks write together, over ``consensus``. Every error in an act is an
    error of all.

    lease: on the folder, on rank 0. Once another run has taken it over, nothing is published or
    deleted there, since what the folder holds is that run's.
    """

    folder: Path
    state: RunState
    shapes: Shapes
    config: Config
    retire: bool
    consensus: Consensus
    lease: Lease | None = None

    @property
    def failed(self) -> str:
        """What an error that nobody expected begins with."""
        return f"cannot write the checkpoint of step {self.state.step} to {self.folder}"

    def write(self, pieces: list[Piece]) -> Path:
        """Write ``pieces`` and what other ranks have; returns the checkpoint's folder. Raises as
        Saver.save does.
        """
        folder, step = self.folder, self.state.step
        partial = folder / names.partial_name(step)
        self._on_rank_0(self._check_lease)
        self._on_rank_0(lambda: store.prepare(folder, step))
        try:
            parts = self._on_all(lambda: self._part(partial, pieces))
            self._on_rank_0(lambda: tensors.write_index(partial, self.shapes, tensors.KINDS, parts))
            # Rank 0 names the files, because a shared disk may show a new file to another machine
            # late, but never under its name.
            files = self._on_rank_0(lambda: store.written(folder, step))
            share = slice(self.consensus.rank, None, self.consensus.ranks)
            sealed = self._on_all(lambda: store.seal(folder, step, files[share]))
            self._on_rank_0(self._check_lease)
            return self._on_rank_0(lambda: self._commit(sealed))
        except MegatronRingError as error:
            stays = self._on_rank_0(self._taken_back)
            if isinstance(error, NotFinite):
                raise Diverged(
                    [
                        f"the checkpoint of step {step} is not written:",
                        *_first(error.problems),
                        stays,
                    ]
                ) from error
            raise CheckpointError([*error.problems, stays]) from error

    def _check_lease(self) -> None:
        if self.lease:
            self.lease.check()

    def _part(self, partial: Path, pieces: list[Piece]) -> list[Written]:
        """This rank's file; what the index has to know of it."""
        try:
            return tensors.write_part(partial, self.consensus.rank, pieces)
        except NotFinite:
            raise
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.failed}: {error}. Free some space, or set --save to another disk."
            ) from error

    def _commit(self, sealed: list[dict[str, FileRecord]]) -> Path:
        records = {name: record for share in sealed for name, record in share.items()}
        made = replace(self.state, commit=commit(), written_at=now())
        return store.commit(self.folder, made, self.config, records, self.retire, tqdm.write)

    def _taken_back(self) -> str:
        """Discard what was written; which checkpoint stays the newest."""
        if not (self.lease and self.lease.lost):
            store.discard(self.folder, self.state.step)
        try:
            before = store.newest(self.folder)
        except CheckpointError as error:
            return str(error)
        return f"{before.path.name} stays the newest." if before else "There is none before it."

    def _on_all(self, act: Callable[[], Any]) -> list[Any]:
        return self.consensus.gather(_any_error(self.failed, act))

    def _on_rank_0(self, act: Callable[[], Any]) -> Any:
        return self.consensus.run_on_rank_zero(_any_error(self.failed, act))


def _newest(folder: str, consensus: Consensus) -> store.Stored | None:
    """``store.newest``, the reading shared out; what is there is what rank 0 sees."""
    candidates, skipped = consensus.run_on_rank_zero(lambda: names.candidates(Path(folder)))
    try:
        return store.first_whole(
            Path(folder), candidates, skipped, lambda path: _verify(path, consensus)
        )
    except _NotRead as error:
        raise CheckpointError(error.problems) from error


def _exactly(checkpoint: str, consensus: Consensus) -> store.Stored:
    """The checkpoint that --load names itself; CheckpointError on all ranks where it is damaged."""
    path = Path(checkpoint)
    try:
        return store.Stored(path, _verify(path, consensus), ())
    except _NotRead as error:
        raise CheckpointError(error.problems) from error
    except CheckpointError as fault:
        others = consensus.run_on_rank_zero(
            lambda: [one.name for one in names.checkpoints(path.absolute().parent)]
        )
        beside = [name for name in others if name != path.absolute().name]
        advice = f"Beside it are {', '.join(beside[:5])}. " if beside else ""
        raise CheckpointError(
            f"{path} is not whole: {fault}. {advice}Set --load to another."
        ) from fault


def _names_one(config: CheckpointConfig) -> bool:
    """Whether --load names a checkpoint itself; else it is a folder of checkpoints, or one where a
    run may start.

    A run starts afresh only in an empty folder, or in its own --save folder, which may have files
    of another kind, such as logs. Raises CheckpointError for everything else, so that no run starts
    from random weights by mistake.
    """
    load = Path(config.load)
    own = config.save and load.resolve() == Path(config.save).resolve()
    if not load.exists():
        if own:
            return False
        raise CheckpointError(
            f"load {load} does not exist. Set --load, or leave it out to start afresh."
        )
    try:
        if (load / store.STATE).is_file():
            _check_own_run(load, config)
            return True
        if load.is_dir() and names.checkpoints(load):
            return False
        formats.check_no_other(load)
    except CheckpointError as fault:
        raise CheckpointError(
            [f"load {fault.problems[0]}", *fault.problems[1:], "Set --load."]
        ) from fault
    if inner := formats.within(load):
        raise CheckpointError(
            f"load {load} holds no checkpoint, but {inner[0]} does. Set --load {inner[0]}."
        )
    found = [
        name for name in formats.content(load) if not name.startswith(".") and name != names.LATEST
    ]
    if found and not own:
        raise CheckpointError(
            f"load {load} holds no checkpoint, and is not empty: it has {', '.join(found[:3])}. Set --load to a folder "
            "of checkpoints, or leave it out to start afresh."
        )
    return False


def _check_own_run(load: Path, config: CheckpointConfig) -> None:
    """A new run must not write among the checkpoints of the run that it takes its weights from."""
    if config.finetune and config.save and load.resolve().parent == Path(config.save).resolve():
        raise CheckpointError(
            f"{load} is a checkpoint of the run in save {config.save}, and finetune makes a new run of its weights. "
            "Set --save to another folder."
        )


def _verify(path: Path, consensus: Consensus) -> RunState:
    """``store.verify``, the files shared out, the largest first.

    Raises CheckpointError where the checkpoint is damaged, and _NotRead where that is not known.
    """
    failed = f"{path} cannot be read"
    state, files = consensus.run_on_rank_zero(
        _any_error(failed, lambda: store.described(path), _NotRead)
    )
    ordered = sorted(files, key=lambda name: (-files[name].bytes, name))
    share = {name: files[name] for name in ordered[consensus.rank :: consensus.ranks]}
    consensus.gather(_any_error(failed, lambda: store.check(path, share), _NotRead))
    return state


class _NotRead(MegatronRingError):
    """A checkpoint could not be read for a reason that is not in the checkpoint, such as memory."""

    exit_code = CheckpointError.exit_code


def _any_error(
    failed: str, act: Callable[[], Got], kind: type[MegatronRingError] = CheckpointError
) -> Callable[[], Got]:
    """Return ``act`` with every error turned into one of ``kind``, which all ranks can agree on.

    The message begins with ``failed`` and has the type and the message of the error, its cause. An
    error other than of memory or disk is a bug, so this rank prints its traceback.
    """

    def checked() -> Got:
        try:
            return act()
        except (MegatronRingError, KeyboardInterrupt):
            raise
        except BaseException as error:
            if not isinstance(error, OSError | MemoryError):
                traceback.print_exc()
            raise kind(f"{failed}: {type(error).__name__}: {error}") from error

    return checked


def _raise(fault: BaseException | None) -> None:
    if fault:
        raise fault


def _first(problems: list[str], most: int = 5) -> list[str]:
    """The first few, and how many more there are."""
    more = len(problems) - most
    return problems[:most] + [f"and {more} more"] * (more > 0)


def _advice(path: Path, problems: list[str]) -> str:
    """What to do about a checkpoint of which the tensors named in ``problems`` are not finite."""
    found = names.checkpoints(path.parent) if names.is_checkpoint(path) else []
    older = [one for one in found if names.step_of(one) < names.step_of(path)]
    where = f"an older checkpoint, such as {older[0]}" if older else "another checkpoint"
    weights_alone = ". --finetune takes the weights alone, and all that was read of them is finite"
    return f"Set --load to {where}" + (
        "." if any(f"{tensors.WEIGHT}/" in one for one in problems) else weights_alone
    )
