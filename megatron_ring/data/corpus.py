"""Where documents come from: files, folders, globs, standard input, or Python's own library; always in one order.

A corpus is cut in shards of about equal bytes of its files, whatever number of processes will work on them: a large
plain ``.jsonl`` on the border of a line, small files put together, any other file as a whole.
"""

import glob
import itertools
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ring.data.compression import bare_suffix
from megatron_ring.data.documents import Piece
from megatron_ring.errors import DataError

SUFFIXES = (".jsonl", ".md", ".parquet", ".py", ".rst", ".txt")
SHARD_BYTES = 4 << 20
"""The smallest shard, of a second's work; those of a large corpus are larger, so that they stay few thousands."""

_LARGEST_SHARD_BYTES = 256 << 20
_SHARDS = 1024

STANDARD_INPUT = "-"

_NOT_LIBRARY = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}

Shard = tuple[Piece, ...]


@dataclass(frozen=True)
class Reading:
    """How shards are read: where the text of a record is, and what to do about one that is bad."""

    json_key: str = "text"
    on_error: Literal["stop", "skip"] = "stop"

    def texts(self, shard: Shard, skipped: list[str]) -> Iterator[str]:
        """Every document that is not empty, as Megatron does. What cannot be read is raised, or told to ``skipped``."""
        for found in itertools.chain.from_iterable(piece.documents(self.json_key) for piece in shard):
            if isinstance(found, DataError):
                if self.on_error == "stop":
                    raise found
                skipped.append(str(found))
            elif found:
                yield found


@dataclass(frozen=True)
class Corpus:
    """Files in the order they are read, and how."""

    files: tuple[Path, ...]
    reading: Reading = Reading()

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
        step_of_lines = self._shard_bytes()
        for file in self.files:
            size = _size(file)
            # Lines can be found from anywhere in a file, unless it is compressed; nothing else can.
            step = step_of_lines if file.suffix == ".jsonl" else max(size, 1)
            yield from (Piece(file, start, min(start + step, size)) for start in range(0, size, step))

    def _shard_bytes(self) -> int:
        return max(SHARD_BYTES, min(self.file_bytes // _SHARDS, _LARGEST_SHARD_BYTES))


def gather(
    inputs: Iterable[str | Path],
    suffixes: Iterable[str] = SUFFIXES,
    reading: Reading = Reading(),
) -> Corpus:
    """The corpus of ``inputs`` in their order: files as they are, folders by what in them has one of ``suffixes``.

    Folders and globs are searched to the bottom and sorted; compressed files count as what they hold. Raises
    DataError for every input that is missing or has no text.
    """
    files: list[Path] = []
    problems: list[str] = []
    for path in map(str, inputs):
        found = _files(path, tuple(suffixes))
        files += found
        if not found and os.path.isdir(path):
            problems.append(f"input {path} has no file named {', '.join('*' + s for s in suffixes)}. Set --suffixes.")
        elif not found:
            problems.append(f"input {path} does not exist. Set --input.")
    if problems:
        raise DataError(problems)
    return Corpus(tuple(files), reading)


def keep_standard_input(file: Path) -> Path:
    """Write standard input to ``file``, because a corpus is read twice and from several places, and return it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as kept:
        shutil.copyfileobj(sys.stdin.buffer, kept)
    return file


def python_library() -> Corpus:
    """The source text of the running Python's standard library without its tests: 12 MB that need no download."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(_library_files(root))
    if not files:
        raise DataError(f"Python's library in {root} comes without its source text (*.py). Set --data-path.")
    return Corpus(tuple(files))


def _library_files(root: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(root):
        # Pruned here rather than filtered afterwards: site-packages can hold more files than all the rest.
        inner[:] = [name for name in inner if name not in _NOT_LIBRARY]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that an input stands for; a name that exists is no glob, whatever is in it."""
    if os.path.isdir(path):
        return sorted(file for file in Path(path).rglob("*") if bare_suffix(file) in suffixes and file.is_file())
    if os.path.exists(path):
        return [Path(path)]
    return [Path(file) for file in sorted(glob.glob(path, recursive=True)) if os.path.isfile(file)]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}. Set --input.") from error
