"""Reading a file as it was before gzip (``.gz``) or zstd (``.zst``) made it smaller; the name says which.

zstd takes Python 3.14 or the package backports.zstd, the same code for older ones. (The package zstandard gives half of
a truncated file for a whole one.)
"""

import gzip
import importlib
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from megatron_ring.errors import DataError

_ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The content of ``file``, decompressed while it is read. Raises DataError when it cannot be, or is damaged."""
    try:
        with _OPENERS.get(file.suffix, _open_plain)(file) as content:
            yield content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(file, error) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}. Set --input.") from error
    except Exception as error:
        # Named by its name, since the package that defines it is not always there.
        if type(error).__name__ != "ZstdError":
            raise
        raise _damaged(file, error) from error


def is_compressed(file: Path) -> bool:
    """Whether the file's name says so."""
    return file.suffix in _OPENERS


def bare_suffix(file: Path) -> str:
    """What the file holds by its name: ``.jsonl`` for ``a.jsonl`` and ``a.jsonl.gz``."""
    return Path(file.stem).suffix if is_compressed(file) else file.suffix


def needed(package: str, file: Path) -> ModuleType:
    """The optional module ``package``, which ``file`` cannot be read without. Raises DataError where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(
            f"{file} is read with {package}, which is not installed. Install it with pip install "
            "'megatron_ring[data]', or leave the file out of --input."
        ) from error


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"{file} is damaged: {error}. Fetch it again, or leave it out of --input.")


def _open_plain(file: Path) -> BinaryIO:
    return file.open("rb")


def _open_gzip(file: Path) -> BinaryIO:
    return gzip.open(file, "rb")


def _open_zstd(file: Path) -> BinaryIO:
    return needed(_ZSTD, file).open(file, "rb")


_OPENERS: dict[str, Callable[[Path], BinaryIO]] = {".gz": _open_gzip, ".zst": _open_zstd}
