"""Where documents come from: files, folders, jsonl, or Python's own standard library; always in the same order.

A plain file is one document, whatever its suffix; a line of a ``.jsonl`` file is one, under ``json_key``. Text is
taken exactly as it stands, in UTF-8, line endings included. Empty documents are left out, as Megatron does.
"""

import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ring.errors import DataError

TEXT_SUFFIXES = (".jsonl", ".md", ".py", ".rst", ".txt")

_NOT_LIBRARY = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}


@dataclass(frozen=True)
class Document:
    """One text, and the bytes it took in its file, which is what a progress bar counts."""

    text: str
    file_bytes: int


@dataclass(frozen=True)
class Corpus:
    """Text files in the order they are read; reading it again gives the same documents again."""

    files: tuple[Path, ...]
    json_key: str = "text"

    @property
    def file_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.stat().st_size for file in self.files)

    def documents(self) -> Iterator[Document]:
        """Every document that is not empty. Raises DataError naming file and line where one cannot be read."""
        for file in self.files:
            try:
                read = _READERS.get(file.suffix, _whole_file)
                yield from (document for document in read(file, self.json_key) if document.text)
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error.strerror}. Set --input.") from error


def gather(inputs: Iterable[str | Path], suffixes: Iterable[str] = TEXT_SUFFIXES, json_key: str = "text") -> Corpus:
    """The corpus of ``inputs`` in their order: files as they are, folders by what in them has one of ``suffixes``.

    Folders are searched to the bottom and sorted. Raises DataError for every input that is missing or has no text.
    """
    files: list[Path] = []
    problems: list[str] = []
    for path in map(Path, inputs):
        found = _text_files(path, tuple(suffixes))
        files += found
        if not path.exists():
            problems.append(f"input {path} does not exist. Set --input.")
        elif not found:
            problems.append(f"input {path} has no file named {', '.join('*' + s for s in suffixes)}. Set --suffixes.")
    if problems:
        raise DataError(problems)
    return Corpus(tuple(files), json_key)


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


def _text_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
    return [path]


def _whole_file(file: Path, json_key: str) -> Iterator[Document]:
    content = file.read_bytes()
    try:
        yield Document(content.decode(), len(content))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: {_not_utf8(error)}") from error


def _json_lines(file: Path, json_key: str) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield Document(_json_text(line, json_key), len(line))
                except ValueError as error:
                    raise DataError(f"{file}:{number}: {error}") from error


def _json_text(line: bytes, json_key: str) -> str:
    """The text under ``json_key``, or ValueError saying what is wrong and how to mend it."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from error
    except ValueError as error:
        raise ValueError(f"not a line of JSON: {error}. Every line of a .jsonl file is one object.") from error
    if not isinstance(record, dict) or not isinstance(text := record.get(json_key), str):
        keys = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"no text under {json_key!r}; found {keys}. Set --json-key.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at character {error.start}, which is no text.") from error
    return text


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte {error.object[error.start]:#04x} is not UTF-8. Convert the file, or leave it out of --input."


_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {".jsonl": _json_lines}
