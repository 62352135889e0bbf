"""When ranks test themselves: in a line as a run begins, or in full with --self-test only, which trains nothing."""

from megatron_ring.config import Config
from megatron_ring.data.dataset import Dataset
from megatron_ring.engine.engine import leave_processes
from megatron_ring.parallel.agreement import Agreement
from megatron_ring.parallel.collective_errors import leaving_together, on_every
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.environment import Environment
from megatron_ring.preflight.consistency import check_data, check_options_and_code
from megatron_ring.preflight.report import self_test
from megatron_ring.settings.setup import Setup


def test_in_a_line(setup: Setup, groups: ProcessGroups, agreement: Agreement) -> None:
    """Rank 0 says what was found. Raises on every rank, once all have left their groups, what is wrong on any."""
    with leaving_together():
        tested = self_test(setup, groups, agreement)
    if agreement.rank == 0:
        print(tested.line())


def test_alone(config: Config, environment: Environment, agreement: Agreement) -> None:
    """Says and raises as above, and leaves the processes. Data is looked at if it was named."""
    with leaving_together():
        check_options_and_code(config, agreement)
        setup = on_every(agreement, lambda: Setup.of(config, environment.world_size))
        if config.data.data_path:
            on_every(agreement, lambda: Dataset.open(config.data, config.training.seed))
            check_data(config.data, agreement)
        tested = self_test(setup, ProcessGroups.build(setup.grid, environment.global_rank), agreement)
    if agreement.rank == 0:
        print(tested.in_full())
    leave_processes()
