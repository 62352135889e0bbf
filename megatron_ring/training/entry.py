"""How a training program begins and ends: its arguments, one clear message when they are wrong, its exit code."""

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
from megatron_ring.parallel.environment import Environment, fix_order_of_sums

# So torch begins what it raises, a RuntimeError without a class of its own (Context::alertNotDeterministic).
_REFUSED = re.compile(r"(\S+) does not have a deterministic implementation")


def begin(is_rank_zero: bool) -> None:
    """Bind this process to what repeats itself, before CUDA and process groups start; ``is_rank_zero``: and say so.

    From here on an operator that does not repeat itself raises, and torch fills the memory that it hands out.
    """
    fix_order_of_sums()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it picks by the clock
    if is_rank_zero:
        print(
            "deterministic    the same bits from run to run, on the same devices and as many of them",
            flush=True,
        )


def refusal(error: RuntimeError) -> ConfigError | None:
    """What to tell the user where ``error`` is torch's, for an operator that only knows how not to repeat itself."""
    refused = _REFUSED.match(str(error))
    if not refused:
        return None
    return ConfigError(
        f"deterministic cannot be had: torch has no form of its operator {refused[1]} that adds up in the same order "
        "every time on this device. Leave --deterministic out."
    )


# A launcher kills all ranks once one has left, so those that keep silent give rank 0 the time to speak.
_SECONDS_TO_SPEAK = 3


def read_files_as_utf8() -> None:
    """Have text files that are opened without an encoding read as UTF-8, whatever the locale is.

    Libraries open UTF-8 files of their own in that way: torch._inductor does, which DeepSpeed
    imports, and fails in an ASCII locale.
    """
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")


def arguments(environment: Environment) -> Config:
    """The config of this process's command line, without what launchers add to it.

    A bad flag ends the program with exit code 2 and the nearest flags; a bad file raises ConfigError. From here on
    --deterministic holds: CUDA and NCCL read what it sets when they start.
    """
    read_files_as_utf8()
    given = [
        argument
        for argument in sys.argv[1:]
        if not argument.startswith(("--local_rank=", "--local-rank="))
    ]
    config = parse(given, console=environment.global_rank == 0)
    if config.training.deterministic:
        begin(is_rank_zero=environment.global_rank == 0)
    return config


@contextlib.contextmanager
def report_once(environment: Environment) -> Iterator[None]:
    """End with the exit code of a user's fault (errors.py), said by one rank.

    Before the processes have joined every rank finds the same fault, and so they do in what they decide together.
    """
    try:
        yield
    except MegatronRingError as error:
        _leave(error, environment, is_rank_zero=environment.global_rank == 0)
    except RuntimeError as error:
        refused = refusal(error)
        if refused is None:
            raise
        _leave(
            refused, environment, is_rank_zero=True
        )  # a pipeline's other stages have other operators
    except SystemExit as leaving:
        if leaving.code and environment.global_rank:
            time.sleep(_SECONDS_TO_SPEAK)
        raise


def _leave(error: MegatronRingError, environment: Environment, is_rank_zero: bool) -> NoReturn:
    if environment.global_rank:
        time.sleep(_SECONDS_TO_SPEAK)
    if is_rank_zero:
        print(
            f"\n{type(error).__name__} on rank {environment.global_rank}: {error}",
            file=sys.stderr,
            flush=True,
        )
    sys.exit(error.exit_code)
