"""The names in a folder of checkpoints: which exist, which is the latest, which are hidden.

    SAVE/step-00000200           a checkpoint, complete when it got this name
    SAVE/.partial-00000200       a checkpoint being written, or left by a process that was killed
    SAVE/.removed-step-00000100  a checkpoint being deleted or replaced by one of the same step
    SAVE/kept-from-00000100      files of the user that were in a deleted checkpoint
    SAVE/earlier-1               the checkpoints of an earlier run, superseded by a run from step 0
    SAVE/latest                  the name of the newest checkpoint
    SAVE/.lease-00000001         the run that writes here (lease.py)

Nothing here reads the content of a checkpoint or modifies the folder.
"""

import itertools
import os
import re
from pathlib import Path

from megatron_ring.errors import CheckpointError
from megatron_ring.untrusted import UntrustedInputError, read_bytes

PARTIAL = ".partial-"
REMOVED = ".removed-"
LATEST = "latest"
LEASE = ".lease-"
_STEP = "step-"
_KEPT = "kept-from-"
_NAME = re.compile(r"(?:\.removed-)?step-([0-9]{8}|[1-9][0-9]{8,15})")
_LONGEST_NAME = 256


def is_written_by_run(name: str) -> bool:
    """Return whether a run creates, replaces or deletes entries of this name in --save."""
    prefixes = (PARTIAL, REMOVED, LEASE, _STEP, _KEPT)
    return name in (LATEST, f".{LATEST}") or name.startswith(prefixes)


def partial_name(step: int) -> str:
    """Return the hidden name of a checkpoint while it is being written."""
    return f"{PARTIAL}{step:08d}"


def final_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of ``step`` once it is complete."""
    return folder / f"{_STEP}{step:08d}"


def removed_path(path: Path) -> Path:
    """Return the hidden name of the checkpoint at ``path`` while it is being deleted."""
    return path.with_name(f"{REMOVED}{path.name}")


def kept_path(path: Path) -> Path:
    """Return a free name for the foreign files in the folder of a deleted checkpoint."""
    first = path.with_name(f"{_KEPT}{path.name.removeprefix(f'{REMOVED}{_STEP}')}")
    others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    return next(
        free for free in (first, *itertools.islice(others, 1000)) if not os.path.lexists(free)
    )


def earlier_path(folder: Path) -> Path:
    """Return a free name for the checkpoints of an earlier run in ``folder``."""
    names = (folder / f"earlier-{number}" for number in itertools.count(1))
    return next(free for free in names if not os.path.lexists(free))


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(_NAME.fullmatch(path.name)[1])


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder has the name of a checkpoint, which contains its step."""
    return _NAME.fullmatch(path.name) is not None


def checkpoints(folder: Path) -> list[Path]:
    """Return every checkpoint in ``folder``, newest first.

    If there is none, returns those marked for deletion: a save that is killed after it has renamed
    the previous checkpoint of its step, and before it has renamed its own, leaves only that one.
    """
    all_checkpoints = [path for path in _entries(folder) if _NAME.fullmatch(path.name)]
    visible = [path for path in all_checkpoints if not path.name.startswith(REMOVED)]
    return sorted(visible or all_checkpoints, key=step_of, reverse=True)


def hidden(folder: Path, prefix: str) -> list[Path]:
    """Return the entries of ``folder`` whose hidden name begins with ``prefix``."""
    return [path for path in _entries(folder) if path.name.startswith(prefix)]


def candidates(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the checkpoints to resume from, newest first, and problems with ``latest``.

    Steps after ``latest`` are of an earlier run that wrote to the same folder and are left out. If
    ``latest`` is damaged and leaves no candidate, all checkpoints are returned: to start from
    scratch because of one byte would be the greater loss.
    """
    existing = checkpoints(folder)
    pointer = folder / LATEST
    if not os.path.lexists(pointer):
        return existing, []
    name = _content(pointer)
    if name in [path.name for path in existing]:
        problems = []
    else:
        problems = [f"{pointer} is passed over: it names {name!r}, which does not exist."]
    if not _NAME.fullmatch(name):
        return existing, problems
    up_to_latest = [path for path in existing if step_of(path) <= step_of(Path(name))]
    return up_to_latest or existing, problems


def _content(pointer: Path) -> str:
    try:
        return read_bytes(pointer, limit=_LONGEST_NAME).decode(errors="replace").strip()
    except (OSError, UntrustedInputError):
        return ""


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoints in {folder}: {error.strerror}. Set --load."
        ) from error
