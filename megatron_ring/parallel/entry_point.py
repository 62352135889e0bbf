"""What every program that runs as several ranks does first and last: arguments, errors, exit codes.

The arguments of launchers are removed, text files are UTF-8, and an error of the user is printed by
one rank, with the exit code of its class (errors.py).
"""

import codecs
import contextlib
import locale
import re
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from megatron_ring.errors import ConfigError, MegatronRingError, RingStalled
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.interrupt_hook import INTERRUPTED

# The start of the RuntimeError that torch raises for an operator without a deterministic version
# (Context::alertNotDeterministic); it has no class of its own.
_NONDETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")

# How gloo reports, as a RuntimeError, that the process at the other end of a connection is gone.
_LOST_CONNECTION = re.compile(r"gloo/transport/.*(closed by peer|reset by peer|Broken pipe)", re.S)

# A launcher kills all ranks once one has exited, so the other ranks give rank 0 time to print.
_SECONDS_FOR_MESSAGE = 3


def arguments_of_user() -> list[str]:
    """Return this process's command line, without the arguments that launchers add."""
    flags_of_launchers = ("--local_rank=", "--local-rank=")
    return [argument for argument in sys.argv[1:] if not argument.startswith(flags_of_launchers)]


def read_files_as_utf8() -> None:
    """Make UTF-8 the default encoding of text files, whatever the locale is.

    Some libraries open their own UTF-8 files without an encoding: torch._inductor, which DeepSpeed
    imports, fails in an ASCII locale.
    """
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")


def nondeterminism_error(error: RuntimeError) -> ConfigError | None:
    """Return the user's error for torch's error about a nondeterministic operator, or None."""
    match = _NONDETERMINISTIC.match(str(error))
    if not match:
        return None
    return ConfigError(
        f"deterministic is not possible: torch has no deterministic version of its operator "
        f"{match[1]} on this device. Leave --deterministic out."
    )


@contextlib.contextmanager
def report_once(environment: Environment) -> Iterator[None]:
    """Print a user's error on one rank only, and exit with its exit code (errors.py).

    Before the processes have joined, every rank finds the same error; after that, ranks raise what
    they have agreed on.
    """
    try:
        yield
    except MegatronRingError as error:
        prints = error.prints_on_every_rank or environment.global_rank == 0
        _exit(error, environment, prints)
    except RuntimeError as error:
        user_error = nondeterminism_error(error)
        if user_error is None:
            raise
        # Every rank prints: pipeline stages run different operators.
        _exit(user_error, environment, prints=True)
    except SystemExit as exit_error:
        if exit_error.code and environment.global_rank:
            time.sleep(_SECONDS_FOR_MESSAGE)
        raise


@contextlib.contextmanager
def report_ended_ranks(environment: Environment) -> Iterator[None]:
    """End in one line, not in a traceback, when Ctrl-C or another rank ends this program.

    For programs without the watchdog and the signal handlers of training; within ``report_once``.
    Exits with code 130 after Ctrl-C. Raises RingStalled where another rank of gloo has ended.
    """
    try:
        yield
    except KeyboardInterrupt:
        if environment.global_rank == 0:
            print("\nInterrupted.", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except RuntimeError as error:
        if not _LOST_CONNECTION.search(str(error)):
            raise
        lost = RingStalled(
            "another rank has ended, and this one cannot continue without it. The message of that "
            "rank, or of the launcher, has the reason. Start the program again."
        )
        lost.prints_on_every_rank = True  # all but the one that ended, which may be rank 0
        raise lost from error


def _exit(error: MegatronRingError, environment: Environment, prints: bool) -> NoReturn:
    if environment.global_rank:
        time.sleep(_SECONDS_FOR_MESSAGE)
    if prints:
        message = f"\n{type(error).__name__} on rank {environment.global_rank}: {error}"
        print(message, file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
