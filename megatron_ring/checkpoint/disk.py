"""Durable writes: after a power cut, no name on the disk refers to bytes that are not there.

A file's bytes and its name in the folder reach the disk independently and in any order, unless each
is flushed with fsync: the bytes on the file, the names on the folder. A rename that is not flushed
can be lost, and a rename that is flushed before the bytes can outlive them.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_ring import untrusted
from megatron_ring.errors import CheckpointError


def flush(path: Path) -> None:
    """Block until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its missing parents, each durably."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for created in missing:
        flush(created.parent)


def flush_names(folder: Path) -> None:
    """Flush ``folder`` and every folder inside it, but none of their files."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            flush(path)


def write(path: Path, content: bytes) -> None:
    """Write a file and flush its bytes; the caller flushes the folder for its name.

    Replaces a file or a link of that name; the target of a link is never written to.
    """
    with untrusted.create(path) as file:
        file.write(content)
    flush(path)


def rename(path: Path, name: Path) -> None:
    """Rename an already flushed ``path`` within its folder and flush the folder.

    Replaces a file of that name.
    """
    path.replace(name)
    flush(name.parent)


def delete(folder: Path) -> None:
    """Delete a folder as far as possible, or only the link if it is a link to a folder.

    The remainder has a hidden name, and the next save tries to delete it again.
    """
    if folder.is_symlink():
        with contextlib.suppress(OSError):
            folder.unlink()
        return
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Raise CheckpointError for an OSError while writing to ``folder``."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write a checkpoint to {folder}: {error.strerror}. Choose another folder "
            "(for a run: --save)."
        ) from error
