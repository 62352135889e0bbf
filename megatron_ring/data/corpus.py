"""The corpus: files from paths, folders, globs, pipes, or Python's own library, in a fixed order.

A corpus is cut into shards of about equal file size, independent of the number of processes that
will tokenize them: a large uncompressed ``.jsonl`` is cut between lines, small files are combined,
and any other file stays whole.
"""

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

from megatron_ring.data.documents import DEFAULT_READING, Piece, Reading, is_plain_json_lines
from megatron_ring.data.file_formats import SUFFIXES, split_name
from megatron_ring.data.file_search import FileSearch
from megatron_ring.errors import DataError

SHARD_BYTES = 4 << 20
"""The smallest shard size, about one second of work.

A large corpus has larger shards, so that there are at most a few thousand."""

_LARGEST_SHARD_BYTES = 256 << 20
_SHARDS_WANTED = 1024

STANDARD_INPUT = "-"

_EXCLUDED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}

Shard = tuple[Piece, ...]


@dataclass(frozen=True)
class Corpus:
    """Files in the order they are read, and how they are read.

    ``left_out`` counts, by reason, input that is not read.
    """

    files: tuple[Path, ...]
    reading: Reading = DEFAULT_READING
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def file_bytes(self) -> int:
        """Total size of the files in bytes."""
        return sum(_size(file) for file in self.files)

    def shards(self) -> list[Shard]:
        """Return the whole corpus as shards of about the same size.

        A piece belongs to shard n if its first byte is in the n-th ``shard_bytes`` of the corpus.
        """
        shard_bytes = self._shard_bytes()
        shards: dict[int, list[Piece]] = {}
        offset = 0
        for piece in self.pieces():
            shards.setdefault(offset // shard_bytes, []).append(piece)
            offset += piece.stop - piece.start
        return [tuple(pieces) for pieces in shards.values()]

    def pieces(self) -> Iterator[Piece]:
        """Yield the whole corpus in order. Raises DataError for a file that no longer exists."""
        part = self._shard_bytes()
        for file in self.files:
            size = _size(file)
            # Uncompressed JSON lines can be read from any offset; nothing else can.
            if size > part and is_plain_json_lines(file, self.reading.json_key):
                for start in range(0, size, part):
                    yield Piece(file, start, min(start + part, size), part_of_lines=True)
            elif size:
                yield Piece(file, 0, size)

    def _shard_bytes(self) -> int:
        return max(SHARD_BYTES, min(self.file_bytes // _SHARDS_WANTED, _LARGEST_SHARD_BYTES))


def gather(
    inputs: Iterable[str | Path],
    suffixes: Iterable[str] = SUFFIXES,
    reading: Reading = DEFAULT_READING,
) -> Corpus:
    """Collect the corpus of ``inputs``, in their order.

    Named files are read whatever their suffix; of folders the files with one of ``suffixes``, where
    that of a compression is ignored. Folders are searched with all subfolders and linked folders,
    each once. Globs are searched in the same way, and folders that they match are read like named
    ones. Raises DataError for every input that is missing or holds nothing that can be read.
    """
    reading = replace(reading, suffixes=tuple(suffix.lower() for suffix in suffixes))
    search = FileSearch(reading)
    for path in map(str, inputs):
        search.add(path)
    if search.problems:
        raise DataError(search.problems)
    return Corpus(tuple(search.files), reading, search.left_out)


def copy_pipes(inputs: Iterable[str], folder: Path, stdin_suffix: str) -> list[str | Path]:
    """Copy each pipe to a file in ``folder`` and return ``inputs`` with the files in their place.

    Pipes are ``-`` for standard input and named pipes. A corpus is read twice and by several
    processes, and a pipe can be read only once. Blocks until the writers close the pipes. Raises
    DataError where standard input is named twice.
    """
    paths: list[str | Path] = list(inputs)
    if paths.count(STANDARD_INPUT) > 1:
        raise DataError("standard input (-) can be read only once. Remove one - from --input.")
    for number, path in enumerate(paths):
        if path == STANDARD_INPUT:
            paths[number] = _copy(sys.stdin.buffer, folder / f"standard-input{stdin_suffix}")
        elif _is_pipe(path):
            # A pipe's name, such as /dev/fd/63, seldom has a suffix; then the content decides.
            suffix = "".join(split_name(Path(path).name))
            with open(path, "rb") as pipe:
                paths[number] = _copy(pipe, folder / f"pipe-{number}{suffix}")
    return paths


def _copy(pipe: BinaryIO, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as copy:
        shutil.copyfileobj(pipe, copy)
    return file


def _is_pipe(path: str) -> bool:
    return os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode)


def python_library() -> Corpus:
    """Return the source text of the running Python's standard library without its tests.

    About 12 MB of text that needs no download. Raises DataError where Python has no source text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(_library_files(root))
    if not files:
        raise DataError(f"Python's library in {root} has no source text (*.py). Set --data-path.")
    return Corpus(tuple(files))


def _library_files(root: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(root):
        # Pruned during the walk: site-packages can hold more files than everything else.
        inner[:] = [name for name in inner if name not in _EXCLUDED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}. Set --input.") from error
