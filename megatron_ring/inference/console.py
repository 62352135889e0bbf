"""What a generation prints and writes: the model and its grid, progress, text, and JSON lines."""

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from megatron_ring.errors import ConfigError, DataError, counted
from megatron_ring.inference.loading import OpenedModel
from megatron_ring.model.shapes import element_count, parameter_shapes

# Control characters by which a text could change a terminal; line feed and tab stay.
_CONTROL = {
    code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if code not in (9, 10)
}


def opening_lines(opened: OpenedModel) -> list[str]:
    """Describe the model and how it is split, for rank 0 to print."""
    settings = opened.settings
    model = opened.model_config
    shapes = parameter_shapes(model, opened.vocab_size, opened.trained_length)
    stripe = f", stripe size {settings.layout.stripe_size}" * (settings.layout.name == "striped")
    beyond = ""
    if opened.seq_length > opened.trained_length:
        beyond = f" (trained on {opened.trained_length:,})"
    return [
        *(f"checkpoint       {note}" for note in opened.notes),
        f"model            {opened.source}: {element_count(shapes):,} parameters, "
        f"{model.num_layers} layers, {opened.vocab_size:,} token ids, "
        f"{opened.seq_length:,} positions{beyond}",
        f"grid             {counted(settings.grid.world_size, 'process')} = "
        f"{settings.grid.ring} ring x {settings.grid.tensor} tensor, "
        f"{settings.layout.name} layout{stripe}",
        f"dtype            {settings.precision.name} ({settings.precision.reason})",
        f"kernel           {settings.kernel.name} ({settings.kernel.reason})",
    ]


class PrefillBar:
    """Shows the progress of a prefill that takes longer than a second, on stderr."""

    def __init__(self, description: str):
        self._description = description
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` tokens have been computed."""
        if self._bar is None:
            self._bar = tqdm(
                total=total,
                desc=self._description,
                unit=" tokens",
                unit_scale=True,
                delay=1,
                disable=None,
                leave=False,
            )
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()


def replace_unprintable_characters() -> None:
    """Print "?" for a character that the encoding of stdout lacks, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def print_text(piece: str) -> None:
    """Print a piece of a text at once, without control characters if stdout is a terminal."""
    if sys.stdout.isatty():
        piece = piece.translate(_CONTROL)
    print(piece, end="", flush=True)


class JsonLines:
    """Writes one JSON object a line, each as soon as it is complete; a context manager.

    ``path`` is a new file; "" for stdout. The file has complete lines only, and is created with the
    first one: a signal that ends the program before leaves none, so that the same command can be
    repeated. Raises ConfigError if it exists, DataError if it cannot be written.
    """

    def __init__(self, path: str):
        self._path = path
        self._file: FileIO | None = None
        if path:
            self._create().close()
            Path(path).unlink()

    def _create(self) -> FileIO:
        try:
            return Path(self._path).open("xb", buffering=0)
        except FileExistsError:
            raise ConfigError(
                f"output {self._path} exists already. Set --output to a new file, or delete it."
            ) from None
        except OSError as error:
            raise DataError(
                f"output {self._path} cannot be written: {error.strerror}. Set --output."
            ) from error

    def write(self, row: dict[str, Any]) -> None:
        """Write an object; it is in the file when this returns."""
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="replace")
        if self._path and self._file is None:
            self._file = self._create()
        try:
            if self._file is None:
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
            else:
                _append(self._file, line)
        except OSError as error:
            raise DataError(
                f"output {self._path or 'stdout'} cannot be written: {error.strerror}. Set "
                "--output to another disk."
            ) from error

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()


def _append(file: FileIO, line: bytes) -> None:
    """Append a line, or nothing: what a full disk has taken of it is removed. Raises OSError."""
    start = file.tell()
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(start)
        raise


def numbered(numbers: Sequence[int]) -> str:
    """Return the numbers of a batch's prompts in words: "prompt 3", "prompts 4 to 7"."""
    first, last = numbers[0], numbers[-1]
    return f"prompt {first}" if first == last else f"prompts {first} to {last}"
