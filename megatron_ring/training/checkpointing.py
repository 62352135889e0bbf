"""Saving and resuming as one act of all ranks: each writes its part, rank 0 makes it the newest, or none of it is.

Which files there are and when they count is ``checkpoint/store.py``'s; what is in them is the engine's.
"""

from pathlib import Path

import torch.distributed as dist

from megatron_ring.checkpoint import store
from megatron_ring.errors import CheckpointError
from megatron_ring.training.engine import Engine
from megatron_ring.training.setup import Setup


def save(engine: Engine, setup: Setup, state: store.RunState) -> Path:
    """Write a checkpoint under --save and return its folder. Blocks until it is whole.

    Raises CheckpointError on every rank when any rank could not write; the checkpoints before it stay as they are.
    """
    folder = Path(setup.config.checkpoint.save)
    _on_rank_0(lambda: store.prepare(folder, state.step))
    failures = engine.save(folder, store.partial_name(state.step))
    if failures:
        _on_rank_0(lambda: store.discard(folder, state.step))
        before = store.newest(folder)
        kept = f"{before.path.name} stays the newest" if before else "there is none before it"
        raise CheckpointError(
            f"cannot write the checkpoint of step {state.step} to {folder}: {failures[0]}. {kept}. "
            "Free some space, or set --save to another disk."
        )
    _on_rank_0(lambda: store.commit(folder, state, setup.config))
    return store.final_path(folder, state.step)


def find(setup: Setup, vocab_size: int) -> store.Stored | None:
    """The checkpoint to resume from, by --load; None to start afresh. Talks to nobody.

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
        store.check_same_model(stored, config, vocab_size)
        grid = setup.grid
        store.check_same_split(stored, grid.data_context, grid.tensor, grid.pipe, config.training.zero_stage)
    return stored


def _on_rank_0(act) -> None:
    """Let rank 0 act on the file system; a CheckpointError of its is raised on every rank."""
    problems: list[list[str] | None] = [None]
    if dist.get_rank() == 0:
        try:
            act()
        except CheckpointError as error:
            problems = [error.problems]
    dist.broadcast_object_list(problems, src=0)
    if problems[0]:
        raise CheckpointError(problems[0])
