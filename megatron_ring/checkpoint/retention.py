"""Which checkpoints are kept, and how the others go: none before a newer one is whole and
``latest`` names it.

A checkpoint that goes gets a hidden name first, so that one killed half deleted is never looked at.
Only files of the checkpoint are deleted: what else is found in its folder, a note or an export, is
kept in a folder of another name.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_ring.checkpoint import disk, names
from megatron_ring.checkpoint.formats import LITTER
from megatron_ring.checkpoint.state import decode
from megatron_ring.config import CheckpointConfig
from megatron_ring.errors import CheckpointError
from megatron_ring.untrusted import UntrustedInputError, read_bytes

STATE = "state.json"
# What a checkpoint is made of, where its state.json is lost or damaged and does not name its files.
_OWN = re.compile(r"state\.json|config\.yaml|tensors\.json|part-\d{5,}\.safetensors")


def outdated(steps: list[int], keep_last: int, keep_every: int) -> list[int]:
    """Of ``steps``, newest first, those that neither rule keeps. The newest is always kept.

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
    """Delete what --keep-last and --keep-every let go, now that the checkpoint of step ``newest``
    is whole.

    Steps beyond it are of an earlier run that wrote to the same folder: they neither count nor go.
    ``note`` is given a line for each that had files of other origin in it.
    """
    steps = [step for path in names.checkpoints(folder) if (step := names.step_of(path)) <= newest]
    for step in outdated(steps, config.keep_last, config.keep_every):
        put_aside(names.final_path(folder, step))
    for path in names.hidden(folder, names.REMOVED):
        if kept := remove(path):
            note(
                f"{kept} has what was in {path.name.removeprefix(names.REMOVED)} and is no part of a checkpoint"
            )


def put_aside(path: Path) -> None:
    """Give a checkpoint the hidden name of those that go; after a power cut too, what is half deleted has that name."""
    remove(names.removed_path(path))
    disk.rename(path, names.removed_path(path))


def clear_leftovers(folder: Path) -> None:
    """Delete what killed saves have left, but not the last checkpoint there is."""
    for path in names.hidden(folder, names.PARTIAL):
        disk.delete(path)
    visible = [
        path for path in names.checkpoints(folder) if not path.name.startswith(names.REMOVED)
    ]
    for path in names.hidden(folder, names.REMOVED) if visible else []:
        remove(path)


def remove(path: Path) -> Path | None:
    """Delete a checkpoint that has been put aside; what cannot be deleted is left to the next save.

    Where its folder has files that are no part of it, that folder gets a visible name, which is
    returned. Of a link to a checkpoint the link alone goes.
    """
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    files = list(_files(path))
    own = _own(path) & set(files)
    for name in (*sorted(own - {STATE}), *(own & {STATE})):
        with contextlib.suppress(OSError):
            # The state names the others, so it stays as long as one of them does.
            if name != STATE or not any(os.path.lexists(path / other) for other in own - {STATE}):
                (path / name).unlink()
    for parent, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):
            Path(parent).rmdir()  # refused where something is left in it
    if own == set(files) or any(os.path.lexists(path / name) for name in own):
        return None
    kept = names.kept_path(path)
    with contextlib.suppress(OSError):
        disk.rename(path, kept)
        return kept
    return None


def _files(folder: Path) -> Iterator[str]:
    """Everything in ``folder`` that is no folder, and links to folders, which are not followed."""
    for parent, inner, found in os.walk(folder):
        links = [name for name in inner if os.path.islink(os.path.join(parent, name))]
        yield from (
            os.path.relpath(os.path.join(parent, name), folder) for name in (*found, *links)
        )


def _own(folder: Path) -> set[str]:
    """The names in ``folder`` that are part of the checkpoint there, or litter."""
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


def set_aside_earlier(folder: Path) -> Path | None:
    """Move all checkpoints in ``folder`` and ``latest`` into a new sub-folder, and return it.

    None where there is none. For the first save of a run from step 0, which would otherwise
    overwrite those of an earlier run step by step. The oldest is moved first and ``latest`` last:
    where a kill comes between, ``--load`` still finds the newest. Raises OSError.
    """
    found = [path for path in names.checkpoints(folder) if not path.name.startswith(names.REMOVED)]
    if not found:
        return None
    aside = names.earlier_path(folder)
    aside.mkdir()
    pointer = folder / names.LATEST
    for path in [*reversed(found), *([pointer] if os.path.lexists(pointer) else [])]:
        if path.is_symlink():
            # A relative link would lead elsewhere from the sub-folder.
            (aside / path.name).symlink_to(path.resolve())
            path.unlink()
        else:
            path.rename(aside / path.name)
    disk.flush(aside)
    disk.flush(folder)
    return aside
