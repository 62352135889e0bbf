"""The files that inputs stand for: files, folders to the bottom, and globs, in one order.

Links to folders are followed, each folder once. What is no file to be read is counted by its
reason.
"""

import fnmatch
import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ring.data.documents import Reading, count, refuse_unreadable
from megatron_ring.data.file_formats import LeftOut, pattern, split_name
from megatron_ring.errors import DataError

_EMPTY_FILES = LeftOut("empty files")
_NOT_FILES = LeftOut("pipes, sockets and devices in folders")
_REACHED_TWICE = LeftOut("linked folders and files reached twice")


class FileSearch:
    """The files of the inputs in order, what is left out, and what is wrong with them."""

    def __init__(self, reading: Reading):
        self.files: list[Path] = []
        self.left_out: Counter[str] = Counter()
        self.problems: list[str] = []
        self._reading = reading

    def add(self, path: str) -> None:
        """Take in one input. A name that exists is no glob, whatever is in it."""
        if os.path.isdir(path):
            self._add_folder(path)
        elif os.path.exists(path):
            self._add_file(path)
        elif os.path.islink(path):
            self.problems.append(_broken_link(path))
        elif found := self._globbed(path):
            for name in found:
                self._add_folder(name) if os.path.isdir(name) else self._add_file(name)
        else:
            self.problems.append(f"input {path} does not exist. Set --input.")

    def _globbed(self, path: str) -> list[str]:
        if "**" not in path.split("/"):
            return sorted(glob.glob(path))
        # Python's glob follows links to folders in circles, and through two of them for ever.
        literal = itertools.takewhile(lambda part: not glob.has_magic(part), path.split("/"))
        root = "/".join(literal) or ("/" if path.startswith("/") else "")
        pattern = path.removeprefix(root).lstrip("/").split("/")
        found = (entry.path for entry in self._walk(root or "."))
        start = len(root.rstrip("/")) + 1 if root else 2
        return sorted(name for name in found if _matches(name[start:].split("/"), pattern))

    def _add_file(self, path: str) -> None:
        if os.path.islink(path) and not os.path.exists(path):
            self.problems.append(_broken_link(path))
        elif not os.path.isfile(path):
            self.problems.append(f"input {path} is neither a file nor a folder. Set --input.")
        elif not os.path.getsize(path):
            self._add_empty(Path(path))
        else:
            try:
                refuse_unreadable(Path(path), self._reading)
            except DataError as error:
                self.problems += error.problems
            self.files.append(Path(path))

    def _add_folder(self, path: str) -> None:
        problems = len(self.problems)
        found = sorted(itertools.chain.from_iterable(map(self._file_of, self._walk(path))))
        for file in found:
            if file.stat().st_size:
                self.files.append(file)
            else:
                self._add_empty(file)
        if not found and len(self.problems) == problems:
            names = ", ".join("*" + suffix for suffix in self._reading.suffixes)
            self.problems.append(f"input {path} has no file named {names}. Set --suffixes.")

    def _add_empty(self, file: Path) -> None:
        suffix, compression = split_name(file.name)
        if compression or suffix in (".parquet", ".tar", ".zip"):
            self.problems.append(
                f"{file} is damaged: it is empty. Fetch it again, or leave it out of --input."
            )
        else:
            count(self.left_out, _EMPTY_FILES)

    def _walk(self, root: str) -> Iterator[os.DirEntry]:
        """What is below ``root`` and no folder. Folders are entered before links to folders, each
        of them once: so a folder that is linked has its own name, and a circle ends."""
        folders, links, seen = [root], [], set()
        while folders or links:
            folder = folders.pop() if folders else links.pop(0)
            try:
                state = os.stat(folder)
                if (state.st_dev, state.st_ino) in seen:
                    count(self.left_out, _REACHED_TWICE)
                    continue
                seen.add((state.st_dev, state.st_ino))
                entries = list(os.scandir(folder))
            except OSError as error:
                self.problems.append(
                    f"input {folder} cannot be read: {error.strerror}. Set --input."
                )
                continue
            for entry in sorted(entries, key=lambda entry: entry.name):
                if not _is_broken(entry) and entry.is_dir():
                    (links if entry.is_symlink() else folders).append(entry.path)
                else:
                    yield entry

    def _file_of(self, entry: os.DirEntry) -> Iterator[Path]:
        suffix = split_name(entry.name)[0]
        if _is_broken(entry):
            self.problems.append(_broken_link(entry.path))
        elif suffix not in self._reading.suffixes:
            count(self.left_out, LeftOut(pattern(suffix)))
        elif not entry.is_file():
            count(self.left_out, _NOT_FILES)
        else:
            yield Path(entry.path)


def _is_broken(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path's ``parts`` match those of a glob, where ** stands for any number of folders.

    As in glob, only a pattern that begins with a dot matches what does.
    """
    if not pattern:
        return not parts
    if pattern[0] == "**":
        rest = pattern[1:] or ["*"]
        depths = itertools.takewhile(
            lambda n: not n or not parts[n - 1].startswith("."), range(len(parts))
        )
        return any(_matches(parts[n:], rest) for n in depths)
    if not parts or parts[0].startswith(".") > pattern[0].startswith("."):
        return False
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _broken_link(path: str) -> str:
    return f"input {path} is a link to {os.readlink(path)}, which does not exist. Mend it, or remove it."
