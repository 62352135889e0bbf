"""What the disk holds when: after a power cut, no name on it stands for bytes that are not there.

A file's bytes and the name it has in its folder reach the disk apart, in any order, unless each is asked for with
fsync: the bytes on the file, the names on the folder. A rename that is not flushed can be lost, and one that is
flushed before its bytes can outlive them.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_ring import untrusted
from megatron_ring.errors import CheckpointError


def flush(path: Path) -> None:
    """Block until the disk holds a file's bytes, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make ``folder`` and those above it, each held by the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        flush(made.parent)


def flush_names(folder: Path) -> None:
    """Flush ``folder`` and every folder in it, but none of their files."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            flush(path)


def write(path: Path, content: bytes) -> None:
    """Write a file and flush its bytes; its name is the folder's to flush.

    Replaces a file or a link of that name; what a link leads to is never written.
    """
    with untrusted.create(path) as file:
        file.write(content)
    flush(path)


def rename(path: Path, name: Path) -> None:
    """Give ``path``, flushed before, another name in the same folder, and flush that too. Replaces a file."""
    path.replace(name)
    flush(name.parent)


def delete(folder: Path) -> None:
    """Take a folder away, as far as that goes: what stays is under a hidden name and tried again by the next save.

    Of a link to a folder only the link goes.
    """
    if folder.is_symlink():
        with contextlib.suppress(OSError):
            folder.unlink()
        return
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Turn what the system says against writing to ``folder`` into CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write a checkpoint to {folder}: {error.strerror}. Choose another folder (in a run: --save)."
        ) from error
