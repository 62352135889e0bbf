"""The checkpoint that a tool was given, by its own folder or by the --save folder that it lies in."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_ring.checkpoint import formats, names, store
from megatron_ring.checkpoint.state import FileRecord, RunState
from megatron_ring.errors import CheckpointError


@dataclass(frozen=True)
class Located:
    """A checkpoint's folder. note: why it is this one, "" where it was given itself."""

    path: Path
    note: str


def locate(given: Path) -> Located:
    """``given`` itself, or the checkpoint in it that ``latest`` names. Raises CheckpointError where there is neither.

    Where ``latest`` is missing or damaged it is the one that a run would try first. No byte of it is checked.
    """
    if (given / store.STATE).is_file():
        return Located(given, "")
    found, problems = names.candidates(given) if given.is_dir() else ([], [])
    if not found:
        formats.check_no_other(given)
        raise CheckpointError(
            f"{given} is no checkpoint, which has a {store.STATE}, and holds none, which are named step-NNNNNNNN. "
            "Give the folder of one, or the one that --save named."
        )
    return Located(found[0], " ".join([f"{given}: the latest is {found[0].name}.", *problems]))


def described(path: Path) -> tuple[RunState, dict[str, FileRecord]]:
    """What the checkpoint at ``path`` says of itself and of its files, which are not read. Raises CheckpointError."""
    with _named(path):
        return store.described(path)


def verify(path: Path) -> None:
    """Read every byte of the checkpoint at ``path``, with a bar where that takes longer than a second.

    Raises CheckpointError naming the first file that is not as it was written.
    """
    _, files = described(path)
    total = sum(record.bytes for record in files.values())
    with tqdm(
        total=total, desc=path.name, unit="B", unit_scale=True, delay=1, disable=None, leave=False
    ) as bar:
        for name, record in files.items():
            with _named(path):
                store.check(path, {name: record})
            bar.update(record.bytes)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """The store tells of a fault in a checkpoint; here it is told in which."""
    try:
        yield
    except CheckpointError as fault:
        raise CheckpointError(f"{path} is not whole: {fault}. Give another checkpoint.") from fault
