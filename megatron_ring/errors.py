"""Errors that a user can fix: one class and one exit code for each kind.

Every other exception is a bug and keeps its traceback. A message states the requested value, the
rule with its numbers, the nearest legal values, and the flag to change.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator

from megatron_ring.console_streams import is_original, tolerant_stream

_MAX_SHOWN_PROBLEMS = 100


class MegatronRingError(Exception):
    """An error that the user can fix.

    Entry points print its message without a traceback and exit with ``exit_code``.
    """

    exit_code = 1
    # Whether every rank prints it, and not only rank 0: each has its own, or rank 0 has none.
    prints_on_every_rank = False

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        shown = self.problems[:_MAX_SHOWN_PROBLEMS]
        if hidden := len(self.problems) - len(shown):
            shown = [*shown, f"and {counted(hidden, 'more problem')}."]
        super().__init__("\n".join(shown))


class ConfigError(MegatronRingError):
    """Illegal options: sizes, unknown keys, or combinations that are not supported."""

    exit_code = 2


class DataError(MegatronRingError):
    """A corpus, token store or tokenizer that is missing, damaged or does not match the others."""

    exit_code = 3


class CheckpointError(MegatronRingError):
    """A checkpoint that cannot be written, is damaged, or is of another model."""

    exit_code = 4


class KernelUnavailable(MegatronRingError):
    """An attention kernel or library, requested by name, that this device, build or dtype lacks."""

    exit_code = 5


class Diverged(MegatronRingError):
    """More bad steps than allowed: non-finite losses or gradients, or loss spikes.

    --on-bad-step and --max-bad-steps set how many are allowed.
    """

    exit_code = 6


class RingStalled(MegatronRingError):
    """A rank of the ring died, or kept this process waiting longer than --ring-timeout.

    The job has to be restarted with --load; steps since the last checkpoint are lost. At inference:
    another rank ended.
    """

    exit_code = 76


def counted(number: int, noun: str, format_spec: str = "") -> str:
    """Return a number with its noun, in the plural unless it is 1.

    >>> counted(1, "step"), counted(1200, "step", ","), counted(2, "process")
    ('1 step', '1,200 steps', '2 processes')
    """
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:{format_spec}} {noun}{ending}"


def nearest_multiples(value: int, multiple: int) -> str:
    """Return the positive multiples next to ``value``, as in ``"8184, 8192"``.

    >>> nearest_multiples(8190, 8), nearest_multiples(3, 8)
    ('8184, 8192', '8')
    """
    below = max(value, 0) // multiple * multiple
    return ", ".join(str(legal) for legal in (below, below + multiple) if legal > 0)


def flag(name: str) -> str:
    """Return the flag of an option: ``"--num-layers"`` for num_layers."""
    return f"--{name.replace('_', '-')}"


def not_positive(options: object, *names: str) -> list[str]:
    """Return the problems of the named options that are not above 0.

    They are ints, floats, or lists of them, which must not be empty.
    """
    rules = {int: "at least 1", float: "above 0"}
    problems = []
    for name in names:
        value = getattr(options, name)
        items = value if isinstance(value, list | tuple) else [value]
        if not items:
            problems.append(
                f"{name} is empty, and must have at least one number. Set {flag(name)}."
            )
        for item in items:
            if not item > 0:  # NaN is refused too
                problems.append(f"{name} {item} must be {rules[type(item)]}. Set {flag(name)}.")
    return problems


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Print a MegatronRingError on stderr and exit with its code; for entry points.

    A closed reader of stdout or stderr, as after ``| head``, is no error: the program continues,
    and further output is dropped. So is all output of a stream that is closed from the start.
    """
    if sys.stdout is None or is_original(sys.stdout):
        sys.stdout = tolerant_stream(sys.stdout, survives_all=False)
    if sys.stderr is None or is_original(sys.stderr):
        sys.stderr = tolerant_stream(sys.stderr, survives_all=False)
    try:
        yield
    except MegatronRingError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
