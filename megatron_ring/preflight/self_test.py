"""The self-test of ranks that are known to run the same: neighbours, attention, links; and what is said of it."""

from dataclasses import dataclass

from megatron_ring.config import Config
from megatron_ring.data.dataset import Dataset
from megatron_ring.engine.engine import leave_processes
from megatron_ring.parallel.collective_errors import abort_collectively, run_checked
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.process_id import Process, in_words
from megatron_ring.preflight.consistency import check_data, check_options_and_code
from megatron_ring.preflight.exactness import Errors, allowed, check_attention
from megatron_ring.preflight.link_bandwidth import (
    Link,
    measure_links,
    median,
    megabytes,
    message_bytes,
    slow,
)
from megatron_ring.preflight.reachability import check_neighbours, check_reach
from megatron_ring.settings.setup import Setup

_LINKS_NAMED = 16


@dataclass(frozen=True)
class Report:
    """What was found, the same on every rank.

    processes: by rank. errors: the worst of any rank. links: of all rings, the slowest first; none in rings of one.
    """

    setup: Setup
    processes: list[Process]
    errors: Errors
    links: list[Link]

    def line(self) -> str:
        """For the start of a run; slow links have a line of their own."""
        said = f"{len(self.processes)} ranks agree; {self._equation()} to {max(self.errors):.0e}"
        if self.links:
            size = f"{message_bytes(self.setup):,} bytes"
            said += (
                f"; {megabytes(median(self.links))} MB/s a hop of {size}, slowest {self.links[0]}"
            )
        return "\n".join([f"self-test        {said}", *self._warnings()])

    def in_full(self) -> str:
        """For --self-test alone."""
        limits = zip(Errors._fields, self.errors, allowed(self.setup))
        errors = ", ".join(f"{name} {error:.1e} ({limit:.1e})" for name, error, limit in limits)
        lines = [
            f"processes        alike, and each where the grid has it: {in_words(self.processes)}",
            f"attention        {self._equation()} by {self.setup.kernel.name} in {self.setup.precision.name}: off by "
            f"(allowed) {errors}",
        ]
        if self.links:
            lines.append(
                f"hops             {message_bytes(self.setup):,} bytes; MB/s, the slowest first:"
            )
            lines += [f"                 {link}" for link in self.links[:_LINKS_NAMED]]
        return "\n".join([*lines, *self._warnings(), "self-test        passed"])

    def _equation(self) -> str:
        return (
            "ring = local attention"
            if self.setup.grid.context > 1
            else "attention = plain attention"
        )

    def _warnings(self) -> list[str]:
        if not (found := slow(self.links)):
            return []
        more = f" and {len(found) - _LINKS_NAMED} more" if len(found) > _LINKS_NAMED else ""
        return [
            f"slow links       {', '.join(map(str, found[:_LINKS_NAMED]))}{more}: MB/s, less than half of the median "
            "within a host or between hosts; look at the network, and at what else runs there"
        ]


def self_test(setup: Setup, groups: ProcessGroups, consensus: Consensus) -> Report:
    """Raises ConfigError on every rank, with the same words, where one fails. Talks in all groups and blocks.

    Options, code and data must be the same already (alike.py): ranks that differ may not even have the same groups.
    """
    processes = consensus.gather(lambda: Process.here(consensus.rank))
    check_neighbours(setup.grid, groups, processes, consensus, setup.device)
    if groups.ring_links and setup.config.parallel.ring_timeout:
        check_reach(consensus)
    errors = check_attention(setup, groups, processes, consensus)
    links = measure_links(setup, groups, processes, consensus)
    return Report(setup, processes, errors, sorted(links, key=lambda link: link.bytes_per_second))


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
