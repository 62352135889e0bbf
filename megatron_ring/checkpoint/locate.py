"""Locates the checkpoint for a tool, given its own folder or the --save folder that contains it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_ring.checkpoint import foreign_formats, names, store
from megatron_ring.checkpoint.state import FileRecord, RunState
from megatron_ring.errors import CheckpointError


@dataclass(frozen=True)
class Located:
    """The folder of a checkpoint. note: why this one was chosen, "" if it was given directly."""

    path: Path
    note: str


def locate(given: Path) -> Located:
    """Return the checkpoint ``given``, or the one in that folder that ``latest`` names.

    If ``latest`` is missing or damaged, it is the checkpoint that a run would try first. No byte of
    it is verified. Raises CheckpointError if there is no checkpoint.
    """
    if (given / store.STATE).is_file():
        return Located(given, "")
    candidates, problems = names.candidates(given) if given.is_dir() else ([], [])
    if not candidates:
        foreign_formats.check_not_foreign(given)
        raise CheckpointError(
            f"{given} is not a checkpoint (it has no {store.STATE}) and holds none (folders named "
            "step-NNNNNNNN). Set the path to a checkpoint or to the folder given as --save."
        )
    note = " ".join([f"{given}: the latest is {candidates[0].name}.", *problems])
    return Located(candidates[0], note)


def described(path: Path) -> tuple[RunState, dict[str, FileRecord]]:
    """Return the state and the file records of the checkpoint at ``path``; reads no other file.

    Raises CheckpointError.
    """
    with _errors_with_path(path):
        return store.described(path)


def verify(path: Path) -> None:
    """Verify every byte of the checkpoint at ``path``.

    Shows a progress bar if that takes longer than a second. Raises CheckpointError naming the first
    file that differs from what was written.
    """
    _, files = described(path)
    total = sum(record.bytes for record in files.values())
    with tqdm(
        total=total, desc=path.name, unit="B", unit_scale=True, delay=1, disable=None, leave=False
    ) as bar:
        for name, record in files.items():
            with _errors_with_path(path):
                store.check(path, {name: record})
            bar.update(record.bytes)


@contextlib.contextmanager
def _errors_with_path(path: Path) -> Iterator[None]:
    """Add the path of the checkpoint to errors of store.py, which name only the fault."""
    try:
        yield
    except CheckpointError as fault:
        raise CheckpointError(f"{path} is not whole: {fault}. Use another checkpoint.") from fault
