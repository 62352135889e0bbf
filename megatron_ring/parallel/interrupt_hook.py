"""Ends a program in one line, with exit code 130, on a Ctrl-C that nothing else handles.

Programs import this module before libraries that take seconds to import, as torch and DeepSpeed do:
a Ctrl-C in these seconds would print a traceback of some library, and be reported as a signal. Its
own imports take milliseconds. Importing it sets sys.excepthook; other exceptions are printed as
before.
"""

import contextlib
import sys
from types import TracebackType

from megatron_ring.errors import ConfigError
from megatron_ring.parallel.environment import Environment

INTERRUPTED = 130
"""The exit code that shells report for a program that SIGINT has ended."""

_previous_hook = sys.excepthook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        _previous_hook(kind, error, trace)
        return
    rank = 0
    with contextlib.suppress(ConfigError):
        rank = Environment.read().global_rank
    if rank == 0:
        with contextlib.suppress(OSError):
            print("\nInterrupted.", file=sys.stderr, flush=True)
    # Python exits with the code of a SystemExit that the hook raises.
    sys.exit(INTERRUPTED)


sys.excepthook = _hook
