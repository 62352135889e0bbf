"""Selects the checkpoint that a run resumes from by --load; checkpoint/selection.py verifies it."""

from collections.abc import Sequence
from pathlib import Path

from megatron_ring.checkpoint import compatibility, foreign_formats, names, store
from megatron_ring.checkpoint.selection import (
    named_checkpoint,
    newest_checkpoint,
    with_checkpoint_error,
)
from megatron_ring.config import CheckpointConfig
from megatron_ring.data.store_fingerprint import Fingerprint
from megatron_ring.errors import CheckpointError
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.settings.run_settings import RunSettings


def select_checkpoint(
    setup: RunSettings,
    vocab_size: int,
    consensus: Consensus,
    fingerprints: Sequence[Fingerprint] = (),
) -> store.Stored | None:
    """Return the checkpoint to resume from, None to start from step 0. Collective; blocks.

    --load names a checkpoint, or a folder of which the newest complete one is used. With --finetune
    the checkpoint becomes step 0 of a new run, which may read any data, unless --save already has a
    checkpoint of that run. Raises CheckpointError on every rank if there is none to use, or if it
    is of another model or program, or of other data than ``fingerprints`` (if there are any)
    without --allow-other-data.
    """
    folders = setup.config.checkpoint
    if not folders.load:
        return None
    names_one = consensus.run_on_rank_zero(
        with_checkpoint_error(
            f"load {folders.load} cannot be read", lambda: _names_a_checkpoint(folders)
        )
    )
    own = None
    if folders.finetune and folders.save:
        own = newest_checkpoint(folders.save, consensus)
    is_new_run = folders.finetune and own is None
    select = named_checkpoint if names_one else newest_checkpoint
    stored = own or select(folders.load, consensus)
    if stored is None:
        if is_new_run:
            raise CheckpointError(
                f"load {folders.load} holds no checkpoint to take weights from. Set --load."
            )
        return None

    def check_model() -> None:
        compatibility.check_same_model(stored, setup.config, vocab_size, weights_only=is_new_run)

    consensus.run_on_rank_zero(with_checkpoint_error(f"{stored.path} cannot be read", check_model))
    if fingerprints and not is_new_run and not folders.allow_other_data:
        consensus.run_on_rank_zero(lambda: compatibility.check_same_data(stored, fingerprints))
    return stored.for_new_run() if is_new_run else stored


def _names_a_checkpoint(config: CheckpointConfig) -> bool:
    """Return whether --load is a checkpoint, not a folder of checkpoints or one to start in.

    A run starts from step 0 only in an empty folder, or in its own --save folder, which may hold
    other kinds of files, such as logs. Raises CheckpointError for everything else, so that no run
    starts from random weights by mistake.
    """
    load = Path(config.load)
    is_written_by_run = bool(config.save) and load.resolve() == Path(config.save).resolve()
    if not load.exists():
        if is_written_by_run:
            return False
        raise CheckpointError(
            f"load {load} does not exist. Set --load, or leave it out to start from step 0."
        )
    try:
        if (load / store.STATE).is_file():
            _check_not_into_same_run(load, config)
            return True
        if load.is_dir() and names.checkpoints(load):
            return False
        foreign_formats.check_not_foreign(load)
    except CheckpointError as error:
        first, *others = error.problems
        raise CheckpointError([f"load {first}", *others, "Set --load."]) from error
    inner = foreign_formats.within(load)
    if inner:
        raise CheckpointError(
            f"load {load} holds no checkpoint, but {inner[0]} does. Set --load {inner[0]}."
        )
    content = [
        name
        for name in foreign_formats.content(load)
        if not name.startswith(".") and name != names.LATEST
    ]
    if content and not is_written_by_run:
        raise CheckpointError(
            f"load {load} holds no checkpoint, and is not empty: it has {', '.join(content[:3])}. "
            "Set --load to a folder of checkpoints, or leave it out to start from step 0."
        )
    return False


def _check_not_into_same_run(load: Path, config: CheckpointConfig) -> None:
    """Refuse to write a new run's checkpoints among those of the run that its weights are from."""
    if config.finetune and config.save and load.resolve().parent == Path(config.save).resolve():
        raise CheckpointError(
            f"{load} is a checkpoint of the run in save {config.save}, and finetune makes a new "
            "run of its weights. Set --save to another folder."
        )
