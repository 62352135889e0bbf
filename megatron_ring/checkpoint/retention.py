"""Retention of checkpoints: which ones are kept, and how the others are deleted.

No checkpoint is deleted before a newer one is complete and ``latest`` names it. It gets a hidden
name first, so that a half-deleted one is never read after a kill. Only files of the checkpoint are
deleted: other files in its folder, such as notes or exports, are kept in a folder of another name.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_ring.checkpoint import disk, names
from megatron_ring.checkpoint.foreign_formats import LITTER
from megatron_ring.checkpoint.state import decode
from megatron_ring.config import CheckpointConfig
from megatron_ring.errors import CheckpointError
from megatron_ring.untrusted import UntrustedInputError, read_bytes

STATE = "state.json"
# Files of a checkpoint whose state.json is lost or damaged and so does not list them.
_OWN = re.compile(r"state\.json|config\.yaml|tensors\.json|part-\d{5,}\.safetensors")


def outdated(steps: list[int], keep_last: int, keep_every: int) -> list[int]:
    """Return those of ``steps``, newest first, that neither rule keeps. The newest is always kept.

    >>> outdated([60, 50, 40, 30, 20, 10], keep_last=2, keep_every=20)
    [30, 10]
    """
    if keep_last == 0:
        return []
    return [step for step in steps[keep_last:] if keep_every == 0 or step % keep_every]


def remove_outdated(
    folder: Path,
    newest: int,
    config: CheckpointConfig,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Delete the checkpoints that --keep-last and --keep-every do not keep.

    ``newest`` is the step of the checkpoint that has just been completed. Later steps are of an
    earlier run that wrote to the same folder: they are neither counted nor deleted. ``note`` is
    called with a line for each deleted checkpoint whose folder had foreign files.
    """
    steps = [step for path in names.checkpoints(folder) if (step := names.step_of(path)) <= newest]
    for step in outdated(steps, config.keep_last, config.keep_every):
        hide(names.final_path(folder, step))
    for path in names.hidden(folder, names.REMOVED):
        if kept := remove(path):
            removed = path.name.removeprefix(names.REMOVED)
            note(f"{kept} has the files of the deleted {removed} that were not part of it")


def hide(path: Path) -> None:
    """Rename a checkpoint to its hidden name for deletion, durably.

    So a half-deleted checkpoint has that name after a power cut too.
    """
    remove(names.removed_path(path))
    disk.rename(path, names.removed_path(path))


def clear_leftovers(folder: Path) -> None:
    """Delete the leftovers of killed saves, but never the only checkpoint."""
    for path in names.hidden(folder, names.PARTIAL):
        disk.delete(path)
    if not _visible(folder):
        return
    for path in names.hidden(folder, names.REMOVED):
        remove(path)


def remove(path: Path) -> Path | None:
    """Delete a hidden checkpoint; anything that cannot be deleted is left to the next save.

    If its folder has foreign files, the folder gets a visible name, which is returned. Of a link to
    a checkpoint, only the link is deleted.
    """
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    files = set(_files(path))
    own = _own(path) & files
    others = sorted(own - {STATE})
    for name in others:
        with contextlib.suppress(OSError):
            (path / name).unlink()
    # The state lists the other files, so it is deleted after all of them.
    if STATE in own and not any(os.path.lexists(path / name) for name in others):
        with contextlib.suppress(OSError):
            (path / STATE).unlink()
    for parent, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):
            Path(parent).rmdir()  # fails if it is not empty
    if own == files or any(os.path.lexists(path / name) for name in own):
        return None
    kept = names.kept_path(path)
    with contextlib.suppress(OSError):
        disk.rename(path, kept)
        return kept
    return None


def _files(folder: Path) -> Iterator[str]:
    """Yield all files in ``folder``, and links to folders, which are not followed."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in (*files, *links):
            yield os.path.relpath(os.path.join(parent, name), folder)


def _own(folder: Path) -> set[str]:
    """Return the names in ``folder`` that are part of its checkpoint, or litter."""
    try:
        _, recorded = decode(read_bytes(folder / STATE))
    except (OSError, CheckpointError, UntrustedInputError):
        recorded = {}
    return {
        name
        for name in _files(folder)
        if name in recorded
        or name == STATE
        or _OWN.fullmatch(name)
        or LITTER.fullmatch(os.path.basename(name))
    }


def move_earlier_run(folder: Path) -> Path | None:
    """Move all checkpoints in ``folder`` and ``latest`` into a new sub-folder, and return it.

    Returns None if there are none. Called before the first save of a run from step 0, which would
    otherwise overwrite the checkpoints of an earlier run step by step. The oldest is moved first
    and ``latest`` last, so that ``--load`` still finds the newest after a kill in between. Raises
    OSError.
    """
    earlier = _visible(folder)
    if not earlier:
        return None
    aside = names.earlier_path(folder)
    aside.mkdir()
    to_move = list(reversed(earlier))
    if os.path.lexists(folder / names.LATEST):
        to_move.append(folder / names.LATEST)
    for path in to_move:
        if path.is_symlink():
            # A relative link would have another target from the sub-folder.
            (aside / path.name).symlink_to(path.resolve())
            path.unlink()
        else:
            path.rename(aside / path.name)
    disk.flush(aside)
    disk.flush(folder)
    return aside


def _visible(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder`` that are not hidden for deletion, newest first."""
    return [path for path in names.checkpoints(folder) if not path.name.startswith(names.REMOVED)]
