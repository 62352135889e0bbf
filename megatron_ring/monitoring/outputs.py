"""What a run writes for people and not for itself: checked before it starts, and never a reason for
it to end.

These are the metrics file and its plot, the monitors, the trace of a ring and the console. A path
that cannot work is refused at the start. What fails later (a full disk, a lost pipe) is reported
once and the run continues without it.
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
from megatron_ring.console_streams import lossy
from megatron_ring.errors import ConfigError, flag
from megatron_ring.monitoring import metrics_file
from megatron_ring.monitoring.ring_profile import trace
from megatron_ring.untrusted import UntrustedInputError, open_regular

T = TypeVar("T")

PNG = b"\x89PNG\r\n\x1a\n"
"""How a PNG picture begins."""


class BestEffort:
    """Calls what may fail without ending the run, and reports the first failure of each kind on the
    console.

    failures: how many calls of each kind have failed.
    """

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()

    def __call__(self, what: str, act: Callable[..., T], *args: Any) -> T | None:
        """The result of ``act``, or None if it raised. ``what``: the output that fails then, as a
        user would name it.
        """
        try:
            return act(*args)
        except Exception as error:
            self.failures[what] += 1
            if self.failures[what] == 1:
                tqdm.write(f"warning          {what} failed, the run continues: {reason(error)}")
            return None


def reason(error: Exception) -> str:
    """One line for an error: the system's words for a file, else its kind and its first line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    first, *_ = [*str(error).splitlines(), ""]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


# ---- before the start ----


def check(logging: LoggingConfig, save: str = "") -> None:
    """Raise ConfigError for every output that is known to be impossible; writes nothing. For rank
    0, which writes.

    That includes outputs that would replace a file of another kind, and those under a name that
    the checkpoints in the folder ``save`` use.
    """
    paths = ("metrics_file", "profile_ring_trace", "tensorboard_dir", "csv_dir")
    found = [
        *(_checkpoint_problem(name, getattr(logging, name), save) for name in paths),
        _file_problem("metrics_file", logging.metrics_file),
        _plot_problem(logging.metrics_file),
        _file_problem("profile_ring_trace", logging.profile_ring_trace),
        _folder_problem("tensorboard_dir", logging.tensorboard_dir),
        _folder_problem("csv_dir", logging.csv_dir),
        _library_problem("tensorboard_dir", logging.tensorboard_dir, "tensorboard"),
        _library_problem("wandb_project", logging.wandb_project, "wandb"),
    ]
    if problems := [problem for problem in found if problem]:
        raise ConfigError(problems)


def _file_problem(name: str, value: str) -> str | None:
    content = metrics_file.problem if name == "metrics_file" else _trace_problem
    why = _why_not(Path(value), folder=False, content=content) if value else None
    return f"{name} {value} {why}. Set {flag(name)} to another file." if why else None


def _plot_problem(value: str) -> str | None:
    """Why the plot of the loss cannot replace what lies beside the metrics file under its name."""
    path = Path(value)
    if not path.name or (os.path.exists(path) and not os.path.isfile(path)):
        return None  # of a device or a pipe no plot is drawn
    plot = path.with_name("loss.png")
    if not plot.is_file():
        return None  # nothing is overwritten: where the plot cannot be drawn, the run warns
    why = picture_problem(plot, (PNG,))
    return (
        f"metrics_file {value}: {plot} {why}. Set --metrics-file to another folder."
        if why
        else None
    )


def _checkpoint_problem(name: str, value: str, save: str) -> str | None:
    if not value or not save:
        return None
    path, folder = Path(value), Path(save)
    try:
        folder = folder.resolve()
        # A link counts by its own place, too, because the link itself may be replaced.
        places = [path.resolve(), path.absolute().parent.resolve() / path.name]
    except (OSError, ValueError, RuntimeError):
        return None  # the other checks name what is wrong with such a path
    for place in places:
        if folder in place.parents and names.is_own(own := place.relative_to(folder).parts[0]):
            return (
                f"{name} {value} is {own} or inside it, in the folder of --save, where the checkpoints use that "
                f"name: they would replace or delete it. Set {flag(name)} to another path."
            )
    return None


def _folder_problem(name: str, value: str) -> str | None:
    why = _why_not(Path(value), folder=True) if value else None
    return f"{name} {value} {why}. Set {flag(name)} to another folder." if why else None


def _library_problem(name: str, value: str, library: str) -> str | None:
    if not value:
        return None
    found = importlib.util.find_spec(library)
    if found and found.origin:  # a folder of that name, as wandb makes one, has no origin
        return None
    return (
        f"{name} {value} needs {library}, which is not installed. Install it "
        f"(pip install 'megatron_ring[monitor]'), or leave {flag(name)} out."
    )


def _why_not(
    path: Path, folder: bool, content: Callable[[Path], str | None] | None = None
) -> str | None:
    """Why nothing can be written to ``path``, or made there; None if it can as far as that is
    known.

    content: returns why an existing file must not be written, None if it may be.
    """
    try:
        there = next(each for each in (path, *path.absolute().parents) if _exists(each))
        if there != path:
            if not there.is_dir():
                return f"cannot be made: {there} is not a folder"
            if not os.access(there, os.W_OK | os.X_OK):
                return f"cannot be made: no permission to write to {there}"
            return None
        if there.is_dir() != folder:
            return "is not a folder" if folder else "is a folder"
        if not os.access(there, os.W_OK | (os.X_OK if folder else os.R_OK)):
            return "cannot be used: no permission to read and write it"
        return content(there) if content else None
    except (OSError, ValueError) as error:
        return f"cannot be used: {reason(error)}"


def _trace_problem(path: Path) -> str | None:
    return _content_problem(path, (trace.BEGINNING,), "a trace of --profile-ring-trace")


def picture_problem(path: Path, kinds: tuple[bytes, ...]) -> str | None:
    """Why no picture can be drawn in the place of what is at ``path``; None if it is missing, empty
    or a picture that begins as one of ``kinds``. Raises nothing.
    """
    try:
        return _content_problem(path, kinds, "a picture") if _exists(path) else None
    except (OSError, ValueError) as error:
        return f"cannot be used: {reason(error)}"


def _content_problem(path: Path, beginnings: tuple[bytes, ...], what: str) -> str | None:
    """Why the existing file ``path`` must not be replaced: neither empty nor begun as it should be.

    Reads the first bytes only. Raises OSError where it cannot be read.
    """
    try:
        descriptor = open_regular(path)
    except UntrustedInputError:
        return "is not a regular file"
    try:
        found = os.pread(descriptor, max(map(len, beginnings)), 0)
    finally:
        os.close(descriptor)
    if not found or found.startswith(beginnings):
        return None
    return f"exists and is not {what}: it would be overwritten"


def _exists(path: Path) -> bool:
    """Raises OSError for what can never exist, as a name that is too long; a link without a target
    is followed.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


# ---- the console ----


def keep_console_from_ending_the_run() -> None:
    """Make sys.stdout and sys.stderr drop what cannot be written, as after ``| head`` or on a full
    disk.

    Their descriptors then lead to /dev/null, so that libraries which write to them do not fail
    either.
    """
    sys.stdout = _tolerant(sys.stdout)
    sys.stderr = _tolerant(sys.stderr)


def _tolerant(stream: TextIO | None) -> TextIO:
    if stream is None:  # it was closed before this process started
        return open(os.devnull, "w")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    tolerant = lossy(stream, survives_all=True)
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in (handler for logger in loggers for handler in getattr(logger, "handlers", [])):
        if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
            handler.setStream(tolerant)
    return tolerant
