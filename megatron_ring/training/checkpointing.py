"""Saving and resuming as one act of all ranks: each writes its part, rank 0 makes it the newest, or none of it is.

Which files there are and when they count is ``checkpoint/store.py``'s; what is in them is the engine's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ring.checkpoint import fit, names, store
from megatron_ring.checkpoint.state import FileRecord
from megatron_ring.errors import CheckpointError
from megatron_ring.training.engine import Engine
from megatron_ring.training.setup import Setup


def save(engine: Engine, setup: Setup, state: store.RunState) -> Path:
    """Write a checkpoint under --save and return its folder. Blocks until it is whole.

    Raises CheckpointError on every rank when any rank could not write; the checkpoints before it stay as they are.
    """
    folder, step = Path(setup.config.checkpoint.save), state.step
    _on_rank_0(lambda: store.prepare(folder, step))
    try:
        _write(engine, folder, step)
        sealed = _sealed(folder, step)
        _on_rank_0(lambda: store.commit(folder, state, setup.config, sealed))
    except CheckpointError as error:
        _on_rank_0(lambda: store.discard(folder, step))
        raise CheckpointError([*error.problems, _what_stays(folder)]) from error
    return names.final_path(folder, step)


def find(setup: Setup, vocab_size: int) -> store.Stored | None:
    """The checkpoint to resume from, by --load; None to start afresh. Talks to nobody, so each rank reads all files.

    Raises CheckpointError when there is none to be had, or it is of another model or another split.
    """
    config = setup.config
    if not config.checkpoint.load:
        return None
    folder = Path(config.checkpoint.load)
    if not folder.is_dir() and config.checkpoint.load != config.checkpoint.save:
        raise CheckpointError(f"load {folder} does not exist. Set --load, or leave it out to start afresh.")
    stored = store.newest(folder)
    if stored:
        fit.check_same_model(stored, config, vocab_size)
        grid = setup.grid
        fit.check_same_split(stored, grid.data_context, grid.tensor, grid.pipe, config.training.zero_stage)
    return stored


def _write(engine: Engine, folder: Path, step: int) -> None:
    """Every rank's part of the engine's state; one rank's failure is raised on all."""
    failures = engine.save(folder, names.partial_name(step))
    if failures:
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {folder}: {failures[0]}. "
            "Free some space, or set --save to another disk."
        )


def _sealed(folder: Path, step: int) -> dict[str, FileRecord]:
    """The record of every file, which the ranks read back a share each; one rank's failure is raised on all.

    Rank 0 names the files, because a shared disk may show a new file to another machine late, but never under its name.
    """
    files = _on_rank_0(lambda: store.written(folder, step))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shares = _on_all(lambda: store.seal(folder, step, files[rank::ranks]))
    return {name: record for share in shares for name, record in share.items()}


def _what_stays(folder: Path) -> str:
    try:
        before = store.newest(folder)
    except CheckpointError as error:
        return str(error)
    return f"{before.path.name} stays the newest." if before else "There is none before it."


def _on_rank_0(act: Callable[[], Any]) -> Any:
    """What rank 0 gets when it acts on the file system, on every rank; its CheckpointError too."""
    return _on_all(act if dist.get_rank() == 0 else lambda: None)[0]


def _on_all(act: Callable[[], Any]) -> list[Any]:
    """What each rank gets when it acts, in rank order, on every rank; the first CheckpointError is raised on all."""
    outcome: Any
    try:
        outcome = act()
    except CheckpointError as error:
        outcome = error
    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    for gathered in outcomes:
        if isinstance(gathered, CheckpointError):
            raise gathered
    return outcomes
