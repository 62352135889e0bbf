"""Find the files that inputs name: files, folders with all subfolders, and globs, in a fixed order.

Links to folders are followed, each folder once. Files and other entries that are not read are
counted by reason.
"""

import fnmatch
import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ring.data.documents import Reading, count_left_out, refuse_unreadable
from megatron_ring.data.file_formats import LeftOut, split_name, suffix_pattern
from megatron_ring.errors import DataError

_EMPTY_FILES = LeftOut("empty files")
_NOT_FILES = LeftOut("pipes, sockets and devices in folders")
_REACHED_TWICE = LeftOut("linked folders and files reached twice")


class FileSearch:
    """Collects the files of inputs in order, the counts of what is left out, and problems."""

    def __init__(self, reading: Reading):
        self.files: list[Path] = []
        self.left_out: Counter[str] = Counter()
        self.problems: list[str] = []
        self._reading = reading

    def add(self, path: str) -> None:
        """Add one input. A path that exists is not read as a glob, whatever characters it has."""
        if os.path.isdir(path):
            self._add_folder(path)
        elif os.path.exists(path):
            self._add_file(path)
        elif os.path.islink(path):
            self.problems.append(_broken_link(path))
        elif matches := self._expand_glob(path):
            for match in matches:
                if os.path.isdir(match):
                    self._add_folder(match)
                else:
                    self._add_file(match)
        else:
            self.problems.append(f"input {path} does not exist. Set --input.")

    def _expand_glob(self, path: str) -> list[str]:
        if "**" not in path.split("/"):
            return sorted(glob.glob(path))
        # Python's glob follows cyclic links to folders repeatedly, and with two of them forever.
        literal = itertools.takewhile(lambda part: not glob.has_magic(part), path.split("/"))
        root = "/".join(literal) or ("/" if path.startswith("/") else "")
        pattern = path.removeprefix(root).lstrip("/").split("/")
        # Without a root the paths begin with "./".
        start = len(root.rstrip("/")) + 1 if root else 2
        paths = (entry.path for entry in self._walk(root or "."))
        return sorted(path for path in paths if _matches(path[start:].split("/"), pattern))

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
        problems_before = len(self.problems)
        entries = self._walk(path)
        files = sorted(file for entry in entries if (file := self._wanted_file(entry)) is not None)
        for file in files:
            if file.stat().st_size:
                self.files.append(file)
            else:
                self._add_empty(file)
        if not files and len(self.problems) == problems_before:
            names = ", ".join("*" + suffix for suffix in self._reading.suffixes)
            self.problems.append(f"input {path} has no file named {names}. Set --suffixes.")

    def _add_empty(self, file: Path) -> None:
        suffix, compression = split_name(file.name)
        if compression or suffix in (".parquet", ".tar", ".zip"):
            self.problems.append(
                f"{file} is damaged: it is empty. Fetch it again, or leave it out of --input."
            )
        else:
            count_left_out(self.left_out, _EMPTY_FILES)

    def _walk(self, root: str) -> Iterator[os.DirEntry]:
        """Yield everything below ``root`` that is not a folder.

        Each folder is entered once, and folders before links to folders: so a folder that is also
        linked is found under its own name, and cyclic links end.
        """
        folders = [root]
        links: list[str] = []
        seen: set[tuple[int, int]] = set()
        while folders or links:
            folder = folders.pop() if folders else links.pop(0)
            try:
                status = os.stat(folder)
                identity = (status.st_dev, status.st_ino)
                if identity in seen:
                    count_left_out(self.left_out, _REACHED_TWICE)
                    continue
                seen.add(identity)
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

    def _wanted_file(self, entry: os.DirEntry) -> Path | None:
        """Return the path of a file to be read; count or report any other entry."""
        suffix = split_name(entry.name)[0]
        if _is_broken(entry):
            self.problems.append(_broken_link(entry.path))
        elif suffix not in self._reading.suffixes:
            count_left_out(self.left_out, LeftOut(suffix_pattern(suffix)))
        elif not entry.is_file():
            count_left_out(self.left_out, _NOT_FILES)
        else:
            return Path(entry.path)
        return None


def _is_broken(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a path's ``parts`` match a glob's; ** stands for any number of folders.

    As in Python's glob, a name that begins with a dot matches only a pattern that does.
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
    return f"input {path} is a link to {os.readlink(path)}, which does not exist. Fix or remove it."
