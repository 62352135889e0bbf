"""Runs EleutherAI's lm-evaluation-harness with a model that is split over a ring of ranks.

    torchrun --nproc-per-node 4 tools/run_lm_eval.py run --model megatron_ring \\
        --model_args load=runs/mine --tasks lambada_openai

Arguments are those of ``lm-eval``. --model_args takes load and the other options of the model by
the names in docs/reference/options.md. Needs pip install 'megatron_ring[eval]'.
"""

import contextlib
import io
import sys

import megatron_ring.parallel.interrupt_hook  # noqa: F401 (before slow imports)

# isort: split

from megatron_ring.errors import ConfigError, reporting_errors
from megatron_ring.inference.rank_commands import Ranks
from megatron_ring.parallel.entry_point import (
    arguments_of_user,
    read_files_as_utf8,
    report_ended_ranks,
    report_once,
)
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.rendezvous import TIMEOUT, join_processes, leave_processes
from megatron_ring.settings.precision import device_type

try:
    from lm_eval.__main__ import HarnessCLI, cli_evaluate

    from megatron_ring.inference.lm_eval_adapter import use_ranks
except ImportError as error:
    if error.name is None or error.name.partition(".")[0] != "lm_eval":
        raise
    HarnessCLI = None


def main(environment: Environment) -> None:
    """Run lm-eval on rank 0, and its commands on all ranks."""
    check_arguments(environment)
    join_processes(environment, device_type(), TIMEOUT)
    ranks = Ranks(environment)
    try:
        drive(ranks)
    finally:
        if not ranks.has_failed:
            leave_processes()


def check_arguments(environment: Environment) -> None:
    """Exit with code 2 for arguments that lm-eval's parser refuses, before the ranks join.

    Raises ConfigError if lm-eval is not installed.
    """
    if HarnessCLI is None:
        raise ConfigError(
            "lm-eval is not installed. Install it with pip install 'megatron_ring[eval]'."
        )
    output = contextlib.nullcontext()
    if environment.global_rank:
        output = contextlib.redirect_stderr(io.StringIO())
    with output:
        HarnessCLI().parse_args()  # of argparse


def drive(ranks: Ranks) -> None:
    """Run lm-eval on rank 0 by its command line; on the others follow its commands."""
    if not ranks.is_rank_zero:
        ranks.follow()
        return
    use_ranks(ranks)
    try:
        cli_evaluate()
    finally:
        ranks.stop()


if __name__ == "__main__":
    read_files_as_utf8()
    with reporting_errors():
        environment = Environment.read()
    sys.argv[1:] = arguments_of_user()
    with report_once(environment), report_ended_ranks(environment):
        main(environment)
