"""Where documents come from: files, folders, globs, standard input, or Python's own library; always in one order.

A corpus is cut in shards of about equal bytes of its files, whatever number of processes will work on them: a large
plain ``.jsonl`` on the border of a line, small files put together, any other file as a whole.
"""

import itertools
import os
import shutil
import stat
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from megatron_ring.data.documents import (
    AS_USUAL,
    Piece,
    Reading,
    is_plain_json_lines,
)
from megatron_ring.data.file_formats import (
    SUFFIXES,
    split_name,
)
from megatron_ring.data.file_search import FileSearch
from megatron_ring.errors import DataError

SHARD_BYTES = 4 << 20
"""The smallest shard, of a second's work; those of a large corpus are larger, so that they stay few thousands."""

_LARGEST_SHARD_BYTES = 256 << 20
_SHARDS = 1024

STANDARD_INPUT = "-"

_NOT_LIBRARY = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}

Shard = tuple[Piece, ...]


@dataclass(frozen=True)
class Corpus:
    """Files in the order they are read, how, and what of the input is no file to be read, counted
    by its reason."""

    files: tuple[Path, ...]
    reading: Reading = AS_USUAL
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def file_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(_size(file) for file in self.files)

    def shards(self) -> list[Shard]:
        """The whole corpus in pieces, put together to shards of about the same size."""
        size = self._shard_bytes()
        pieces = list(self.pieces())
        begins = itertools.accumulate((piece.stop - piece.start for piece in pieces), initial=0)
        grouped = itertools.groupby(zip(begins, pieces), key=lambda found: found[0] // size)
        return [tuple(piece for _, piece in group) for _, group in grouped]

    def pieces(self) -> Iterator[Piece]:
        """The whole corpus in order. Raises DataError for a file that has gone."""
        part = self._shard_bytes()
        for file in self.files:
            size = _size(file)
            # Plain JSON lines can be read from anywhere in a file; nothing else can.
            if size > part and is_plain_json_lines(file, self.reading.json_key):
                yield from (
                    Piece(file, start, min(start + part, size), part_of_lines=True)
                    for start in range(0, size, part)
                )
            elif size:
                yield Piece(file, 0, size)

    def _shard_bytes(self) -> int:
        return max(SHARD_BYTES, min(self.file_bytes // _SHARDS, _LARGEST_SHARD_BYTES))


def gather(
    inputs: Iterable[str | Path],
    suffixes: Iterable[str] = SUFFIXES,
    reading: Reading = AS_USUAL,
) -> Corpus:
    """The corpus of ``inputs`` in their order: files as they are, folders by what in them has one of ``suffixes``.

    Folders are searched to the bottom, links to folders included, each folder once; globs are
    searched likewise, and the folders that they find are read as those that are named. Compressed
    files count as what they hold. Raises DataError for every input that is missing or holds nothing
    that can be read.
    """
    reading = replace(reading, suffixes=tuple(suffix.lower() for suffix in suffixes))
    search = FileSearch(reading)
    for path in map(str, inputs):
        search.add(path)
    if search.problems:
        raise DataError(search.problems)
    return Corpus(tuple(search.files), reading, search.left_out)


def keep_pipes(inputs: Iterable[str], folder: Path, stdin_suffix: str) -> list[str | Path]:
    """``inputs`` with a file in ``folder`` in the place of each pipe: ``-`` for standard input, and
    named pipes.

    A corpus is read twice and from several places, and a pipe once. Blocks until the pipes are
    closed by their writers. Raises DataError where standard input is named twice.
    """
    kept: list[str | Path] = list(inputs)
    if kept.count(STANDARD_INPUT) > 1:
        raise DataError("standard input (-) can be read once. Leave one - out of --input.")
    for number, path in enumerate(kept):
        if path == STANDARD_INPUT:
            kept[number] = _keep(sys.stdin.buffer, folder / f"standard-input{stdin_suffix}")
        elif _is_pipe(path):
            # A pipe's name, such as /dev/fd/63, seldom has a suffix; then its content decides.
            suffix = "".join(split_name(Path(path).name))
            with open(path, "rb") as pipe:
                kept[number] = _keep(pipe, folder / f"pipe-{number}{suffix}")
    return kept


def _keep(pipe: BinaryIO, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as kept:
        shutil.copyfileobj(pipe, kept)
    return file


def _is_pipe(path: str) -> bool:
    return os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode)


def python_library() -> Corpus:
    """The source text of the running Python's standard library without its tests: 12 MB that need no download."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(_library_files(root))
    if not files:
        raise DataError(
            f"Python's library in {root} comes without its source text (*.py). Set --data-path."
        )
    return Corpus(tuple(files))


def _library_files(root: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(root):
        # Pruned here rather than filtered afterwards: site-packages can hold more files than all the rest.
        inner[:] = [name for name in inner if name not in _NOT_LIBRARY]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}. Set --input.") from error
