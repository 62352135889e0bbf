"""Starts and ends a training program: arguments, --deterministic, error messages and exit codes.

With --deterministic, a run started again the same way has the same losses, gradient norms and
checkpoints, bit for bit: with the same config, number of processes, kind of devices, library
versions and, on a CPU, number of threads. The attention kernel is chosen accordingly
(settings/run_settings.py). The ring and gloo add in an order that depends on the ranks alone.

NCCL adds along rings or trees that it chooses by message size and the links it finds, not by
timing, so it repeats itself on the same nodes; on others, or in another version, it may choose
differently. ``NCCL_ALGO=Ring`` restricts its choice. None of this has been run on a GPU.
"""

import codecs
import contextlib
import locale
import re
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import torch

from megatron_ring.config import Config, parse
from megatron_ring.errors import ConfigError, MegatronRingError
from megatron_ring.parallel.environment import Environment, fix_reduction_order

# The start of the RuntimeError that torch raises for an operator without a deterministic version
# (Context::alertNotDeterministic); it has no class of its own.
_NONDETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")

# A launcher kills all ranks once one has exited, so the other ranks give rank 0 time to print.
_SECONDS_FOR_MESSAGE = 3


def parse_arguments(environment: Environment) -> Config:
    """Parse this process's command line, without the arguments that launchers add.

    A bad flag ends the program with exit code 2 and the nearest flags; a bad file raises
    ConfigError. --deterministic takes effect here, because CUDA and NCCL read its settings when
    they start.
    """
    read_files_as_utf8()
    flags_of_launchers = ("--local_rank=", "--local-rank=")
    given = [argument for argument in sys.argv[1:] if not argument.startswith(flags_of_launchers)]
    is_rank_zero = environment.global_rank == 0
    config = parse(given, console=is_rank_zero)
    if config.training.deterministic:
        make_deterministic(is_rank_zero)
    return config


def read_files_as_utf8() -> None:
    """Make UTF-8 the default encoding of text files, whatever the locale is.

    Some libraries open their own UTF-8 files without an encoding: torch._inductor, which DeepSpeed
    imports, fails in an ASCII locale.
    """
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")


def make_deterministic(is_rank_zero: bool) -> None:
    """Restrict this process to deterministic operators, before CUDA and process groups start.

    From here on a nondeterministic operator raises, and torch fills the memory it allocates. Prints
    a line on global rank 0.
    """
    fix_reduction_order()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it chooses kernels by measured time
    if is_rank_zero:
        print(
            "deterministic    bitwise reproducible on the same devices and number of processes",
            flush=True,
        )


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


def _exit(error: MegatronRingError, environment: Environment, prints: bool) -> NoReturn:
    if environment.global_rank:
        time.sleep(_SECONDS_FOR_MESSAGE)
    if prints:
        message = f"\n{type(error).__name__} on rank {environment.global_rank}: {error}"
        print(message, file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
