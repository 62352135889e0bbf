"""What lies in a folder of checkpoints, by name: which are there, which is the latest, which are not to be seen.

    SAVE/step-00000200           a checkpoint, whole when it got this name
    SAVE/.partial-00000200       one that is being written, or was when its process was killed
    SAVE/.removed-step-00000100  one that is being deleted, or makes way for another of the same step
    SAVE/kept-from-00000100      what a user had put into one that is deleted
    SAVE/earlier-1               the checkpoints of a run that another one from step 0 has superseded
    SAVE/latest                  the name of the newest
    SAVE/.lease-00000001         the run that writes here (lease.py)

Nothing here looks into a checkpoint or changes anything.
"""

import itertools
import os
import re
from pathlib import Path

from megatron_ring.errors import CheckpointError
from megatron_ring.untrusted import UntrustedInputError, read_bytes

PARTIAL, REMOVED, LATEST, LEASE = ".partial-", ".removed-", "latest", ".lease-"
_STEP, _KEPT = "step-", "kept-from-"
_NAME = re.compile(r"(?:\.removed-)?step-([0-9]{8}|[1-9][0-9]{8,15})")
_LONGEST_NAME = 256


def is_own(name: str) -> bool:
    """Whether a run creates, replaces or deletes what has this name in its --save folder."""
    prefixes = (PARTIAL, REMOVED, LEASE, _STEP, _KEPT)
    return name in (LATEST, f".{LATEST}") or name.startswith(prefixes)


def partial_name(step: int) -> str:
    """The hidden name that a checkpoint has while it is written."""
    return f"{PARTIAL}{step:08d}"


def final_path(folder: Path, step: int) -> Path:
    """The folder that the checkpoint of ``step`` has once it is whole."""
    return folder / f"{_STEP}{step:08d}"


def removed_path(path: Path) -> Path:
    """The hidden name that the checkpoint at ``path`` has while it is deleted."""
    return path.with_name(f"{REMOVED}{path.name}")


def kept_path(path: Path) -> Path:
    """A free name for what was in the folder of the checkpoint at ``path`` and no part of it."""
    first = path.with_name(f"{_KEPT}{path.name.removeprefix(f'{REMOVED}{_STEP}')}")
    others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    return next(
        free for free in (first, *itertools.islice(others, 1000)) if not os.path.lexists(free)
    )


def earlier_path(folder: Path) -> Path:
    """A free name for the checkpoints of an earlier run in ``folder``."""
    names = (folder / f"earlier-{number}" for number in itertools.count(1))
    return next(free for free in names if not os.path.lexists(free))


def step_of(path: Path) -> int:
    """The step that the name of a checkpoint tells."""
    return int(_NAME.fullmatch(path.name)[1])


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has the name of a checkpoint, which tells its step."""
    return _NAME.fullmatch(path.name) is not None


def checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint in ``folder``, newest first.

    Where there is none, those about to be deleted: a save that is killed between making way for its checkpoint and
    giving it its name leaves the one before under that name alone.
    """
    found = [path for path in _entries(folder) if _NAME.fullmatch(path.name)]
    seen = [path for path in found if not path.name.startswith(REMOVED)]
    return sorted(seen or found, key=step_of, reverse=True)


def hidden(folder: Path, prefix: str) -> list[Path]:
    """What is there under a hidden name that begins with ``prefix``."""
    return [path for path in _entries(folder) if path.name.startswith(prefix)]


def candidates(folder: Path) -> tuple[list[Path], list[str]]:
    """What to resume from, newest first, and what is wrong with ``latest``.

    Steps beyond ``latest`` are of an earlier run that wrote to the same folder. Where ``latest`` is damaged and leaves
    nothing, all count: a run that starts from nothing because of one byte would be the greater loss.
    """
    found, pointer = checkpoints(folder), folder / LATEST
    if not os.path.lexists(pointer):
        return found, []
    name = _content(pointer)
    up_to = [
        path for path in found if _NAME.fullmatch(name) and step_of(path) <= step_of(Path(name))
    ]
    there = name in [path.name for path in found]
    return up_to or found, [] if there else [
        f"{pointer} is passed over: it names {name!r}, which is not there."
    ]


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
