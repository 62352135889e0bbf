"""Outputs that a run does not need itself: checked at the start, and best effort from then on.

They are the metrics file and its plot, the monitors, the ring trace and the console. A path that
cannot be written is an error at the start. An output that fails later (a full disk, a lost pipe) is
reported once, and the run continues without it.
"""

import importlib.util
import io
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from megatron_ring.checkpoint import names
from megatron_ring.config import LoggingConfig
from megatron_ring.console_streams import tolerant_stream
from megatron_ring.errors import ConfigError, flag
from megatron_ring.monitoring import metrics_file
from megatron_ring.monitoring.ring_profile import trace
from megatron_ring.untrusted import UntrustedInputError, open_regular

T = TypeVar("T")

PNG = b"\x89PNG\r\n\x1a\n"
"""The first bytes of a PNG picture."""


class BestEffort:
    """Calls functions whose failure must not end the run; reports each output's first failure.

    failures: the number of failed calls by output.
    """

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()

    def __call__(self, what: str, act: Callable[..., T], *args: Any) -> T | None:
        """Return the result of ``act``, or None if it raised.

        what: the name of the output, for the warning.
        """
        try:
            return act(*args)
        except Exception as error:
            self.failures[what] += 1
            if self.failures[what] == 1:
                tqdm.write(
                    f"warning          {what} failed, the run continues: {describe_error(error)}"
                )
            return None


def describe_error(error: Exception) -> str:
    """Describe an error in one line: the system's text for a file, else the type and first line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    first, *_ = [*str(error).splitlines(), ""]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


# ---- before the start ----


def check_outputs(logging: LoggingConfig, save: str = "") -> None:
    """Raise ConfigError for all outputs that cannot be written; writes nothing.

    That includes outputs that would replace a file of another kind, and those under a name that
    the checkpoints in the folder ``save`` use. To be called on rank 0, which writes the outputs.
    """
    paths = ("metrics_file", "profile_ring_trace", "tensorboard_dir", "csv_dir")
    checks = [
        *(_checkpoint_problem(name, getattr(logging, name), save) for name in paths),
        _file_problem("metrics_file", logging.metrics_file),
        _plot_problem(logging.metrics_file),
        _file_problem("profile_ring_trace", logging.profile_ring_trace),
        _folder_problem("tensorboard_dir", logging.tensorboard_dir),
        _folder_problem("csv_dir", logging.csv_dir),
        _library_problem("tensorboard_dir", logging.tensorboard_dir, "tensorboard"),
        _library_problem("wandb_project", logging.wandb_project, "wandb"),
    ]
    if problems := [problem for problem in checks if problem]:
        raise ConfigError(problems)


def _file_problem(name: str, value: str) -> str | None:
    if not value:
        return None
    content_problem = metrics_file.problem if name == "metrics_file" else _trace_problem
    problem = _path_problem(Path(value), folder=False, content_problem=content_problem)
    return f"{name} {value} {problem}. Set {flag(name)} to another file." if problem else None


def _plot_problem(value: str) -> str | None:
    """Return why the loss plot beside the metrics file cannot replace the existing file there."""
    path = Path(value)
    if not path.name or (os.path.exists(path) and not os.path.isfile(path)):
        return None  # no plot is drawn for a device or a pipe
    plot = path.with_name("loss.png")
    if not plot.is_file():
        return None  # nothing is overwritten; a plot that cannot be drawn is a warning later
    problem = picture_problem(plot, (PNG,))
    if not problem:
        return None
    return f"metrics_file {value}: {plot} {problem}. Set --metrics-file to another folder."


def _checkpoint_problem(name: str, value: str, save: str) -> str | None:
    """Return why an output collides with the names that checkpoints use in the folder ``save``."""
    if not value or not save:
        return None
    path = Path(value)
    try:
        folder = Path(save).resolve()
        # The location of a link itself is checked too, because the link may be replaced.
        locations = [path.resolve(), path.absolute().parent.resolve() / path.name]
    except (OSError, ValueError, RuntimeError):
        return None  # the other checks report such a path
    for location in locations:
        if folder not in location.parents:
            continue
        top = location.relative_to(folder).parts[0]
        if names.is_written_by_run(top):
            return (
                f"{name} {value} is {top}, or inside it, in the folder of --save. Checkpoints use "
                f"that name and would replace or delete it. Set {flag(name)} to another path."
            )
    return None


def _folder_problem(name: str, value: str) -> str | None:
    problem = _path_problem(Path(value), folder=True) if value else None
    return f"{name} {value} {problem}. Set {flag(name)} to another folder." if problem else None


def _library_problem(name: str, value: str, library: str) -> str | None:
    if not value:
        return None
    spec = importlib.util.find_spec(library)
    if spec and spec.origin:  # a mere folder of that name, such as wandb creates, has no origin
        return None
    return (
        f"{name} {value} needs {library}, which is not installed. Install it "
        f"(pip install 'megatron_ring[monitor]'), or leave {flag(name)} out."
    )


def _path_problem(
    path: Path, folder: bool, content_problem: Callable[[Path], str | None] | None = None
) -> str | None:
    """Return why ``path`` cannot be written or created; None if it can, as far as is known.

    content_problem: returns why an existing file must not be written, or None.
    """
    try:
        existing = next(each for each in (path, *path.absolute().parents) if _exists(each))
        if existing != path:
            if not existing.is_dir():
                return f"cannot be created: {existing} is not a folder"
            if not os.access(existing, os.W_OK | os.X_OK):
                return f"cannot be created: no permission to write to {existing}"
            return None
        if path.is_dir() != folder:
            return "is not a folder" if folder else "is a folder"
        if not os.access(path, os.W_OK | (os.X_OK if folder else os.R_OK)):
            return "cannot be used: no permission to read and write it"
        return content_problem(path) if content_problem else None
    except (OSError, ValueError) as error:
        return f"cannot be used: {describe_error(error)}"


def _trace_problem(path: Path) -> str | None:
    return _content_problem(path, (trace.BEGINNING,), "a trace of --profile-ring-trace")


def picture_problem(path: Path, kinds: tuple[bytes, ...]) -> str | None:
    """Return why a picture must not be written to ``path``; None if it may be.

    It may replace a missing or empty file, or a picture that begins with one of ``kinds``. Raises
    nothing.
    """
    try:
        return _content_problem(path, kinds, "a picture") if _exists(path) else None
    except (OSError, ValueError) as error:
        return f"cannot be used: {describe_error(error)}"


def output_problem(path: Path, beginnings: tuple[bytes, ...], what: str) -> str | None:
    """Return why a file of the kind ``what`` cannot be written to ``path``, or None.

    It may replace a missing or empty file, or one of its own kind, which begins with one of
    ``beginnings``. Writes nothing and raises nothing.
    """
    return _path_problem(
        path, folder=False, content_problem=lambda file: _content_problem(file, beginnings, what)
    )


def _content_problem(path: Path, beginnings: tuple[bytes, ...], what: str) -> str | None:
    """Return why the existing file must not be replaced: it is neither empty nor of this kind.

    Reads only the first bytes, which must be one of ``beginnings``. Raises OSError.
    """
    try:
        descriptor = open_regular(path)
    except UntrustedInputError:
        return "is not a regular file"
    try:
        first_bytes = os.pread(descriptor, max(map(len, beginnings)), 0)
    finally:
        os.close(descriptor)
    if not first_bytes or first_bytes.startswith(beginnings):
        return None
    return f"exists and is not {what}: it would be overwritten"


def _exists(path: Path) -> bool:
    """Return whether the file exists, following links.

    Raises OSError for a path that can never exist, such as a name that is too long.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


# ---- the console ----


def tolerate_console_errors() -> None:
    """Make sys.stdout and sys.stderr drop what cannot be written, as after ``| head``.

    A full disk is survived too. Lost descriptors are redirected to /dev/null, so that libraries
    which write to them do not fail either.
    """
    sys.stdout = _tolerant(sys.stdout)
    sys.stderr = _tolerant(sys.stderr)


def _tolerant(stream: TextIO | None) -> TextIO:
    if stream is not None and not isinstance(stream, io.TextIOWrapper):
        return stream
    tolerant = tolerant_stream(stream, survives_all=True)
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", []):
            # logging._StderrHandler, which some libraries install, reads sys.stderr at each record.
            follows = isinstance(handler, logging._StderrHandler)
            is_stream = isinstance(handler, logging.StreamHandler) and not follows
            if is_stream and handler.stream is stream:
                handler.setStream(tolerant)
    return tolerant
