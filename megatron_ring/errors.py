"""What can go wrong for a user, one class and one exit code each; everything else is a bug and keeps its traceback.

A message says what was asked, the rule with its numbers, the nearest legal values, and the flag to change.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator

from megatron_ring.console_streams import lossy, writes_directly

_SHOWN_PROBLEMS = 100


class MegatronRingError(Exception):
    """A fault the user can mend. Entry points print it without a traceback and leave with ``exit_code``."""

    exit_code = 1

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        shown = self.problems[:_SHOWN_PROBLEMS]
        if more := len(self.problems) - len(shown):
            shown = [*shown, f"and {more} problems more of this kind."]
        super().__init__("\n".join(shown))


class ConfigError(MegatronRingError):
    """Options that cannot be met: illegal sizes, unknown keys, combinations that do not exist."""

    exit_code = 2


class DataError(MegatronRingError):
    """A corpus, token store or tokenizer that is missing, damaged or does not fit the others."""

    exit_code = 3


class CheckpointError(MegatronRingError):
    """A checkpoint that cannot be written, is damaged, or belongs to another model."""

    exit_code = 4


class KernelUnavailable(MegatronRingError):
    """An attention kernel or a library was asked for by name, and this device, build or dtype does not have it."""

    exit_code = 5


class Diverged(MegatronRingError):
    """Steps whose loss or gradient is not finite, or whose loss is a spike: as many as --on-bad-step lets pass."""

    exit_code = 6


class RingStalled(MegatronRingError):
    """A neighbour in the ring died or kept this process waiting longer than --ring-timeout: start the job again."""

    exit_code = 76


def nearest_multiples(value: int, multiple: int) -> str:
    """The legal values around ``value`` when it must be a positive multiple: ``"8184, 8192"``.

    >>> nearest_multiples(8190, 8), nearest_multiples(3, 8)
    ('8184, 8192', '8')
    """
    below = max(value, 0) // multiple * multiple
    return ", ".join(str(legal) for legal in (below, below + multiple) if legal > 0)


def flag(name: str) -> str:
    """The flag of an option: ``"--num-layers"`` for num_layers."""
    return f"--{name.replace('_', '-')}"


def not_positive(options: object, *names: str) -> list[str]:
    """What to say of the options, int or float, that are not above 0."""
    rule = {int: "at least 1", float: "above 0"}
    values = {name: getattr(options, name) for name in names}
    return [
        f"{name} {value} must be {rule[type(value)]}. Set {flag(name)}."
        for name, value in values.items()
        if not value > 0  # so that nan is refused too
    ]


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn a user's fault into its message on stderr and its exit code, for the entry points.

    A reader of stdout or stderr that has gone, as after ``| head``, is no error: the program goes
    on, and what it writes there is dropped.
    """
    if writes_directly(sys.stdout):
        sys.stdout = lossy(sys.stdout, survives_all=False)
    if writes_directly(sys.stderr):
        sys.stderr = lossy(sys.stderr, survives_all=False)
    try:
        yield
    except MegatronRingError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
