"""When ranks test themselves: in a line as a run begins, or in full with --self-test only, which trains nothing."""

from megatron_ring.config import Config
from megatron_ring.data.dataset import Dataset
from megatron_ring.engine.engine import leave_processes
from megatron_ring.parallel.collective_errors import abort_collectively, run_checked
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.environment import Environment
from megatron_ring.preflight.consistency import check_data, check_options_and_code
from megatron_ring.preflight.report import self_test
from megatron_ring.settings.setup import Setup


def run_startup_check(setup: Setup, groups: ProcessGroups, consensus: Consensus) -> None:
    """Rank 0 says what was found. Raises on every rank, once all have left their groups, what is wrong on any."""
    with abort_collectively():
        tested = self_test(setup, groups, consensus)
    if consensus.rank == 0:
        print(tested.line())


def run_self_test_only(config: Config, environment: Environment, consensus: Consensus) -> None:
    """Says and raises as above, and leaves the processes. Data is looked at if it was named."""
    with abort_collectively():
        check_options_and_code(config, consensus)
        setup = run_checked(consensus, lambda: Setup.of(config, environment.world_size))
        if config.data.data_path:
            run_checked(consensus, lambda: Dataset.open(config.data, config.training.seed))
            check_data(config.data, consensus)
        tested = self_test(
            setup, ProcessGroups.build(setup.grid, environment.global_rank), consensus
        )
    if consensus.rank == 0:
        print(tested.in_full())
    leave_processes()
