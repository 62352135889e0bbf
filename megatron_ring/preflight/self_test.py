"""The self-test: group membership, reachability, attention and link bandwidth, and its report.

It runs at the start of training (``run_startup_check``, one line) or by itself with the bare flag
``--self-test`` (``run_self_test_only``, a full report, no training).
"""

from dataclasses import dataclass

from megatron_ring.config import Config
from megatron_ring.data.dataset import Dataset
from megatron_ring.engine.extra_keys import resolve_settings
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.consensus import Consensus, abort_collectively, run_checked
from megatron_ring.parallel.environment import Environment
from megatron_ring.parallel.process_id import ProcessId, describe_processes
from megatron_ring.parallel.rendezvous import leave_processes
from megatron_ring.preflight.consistency import check_data, check_layout, check_options_and_code
from megatron_ring.preflight.exactness import Errors, check_attention, error_limits
from megatron_ring.preflight.link_bandwidth import (
    Link,
    measure_links,
    median,
    megabytes,
    message_bytes,
    slow_links,
)
from megatron_ring.preflight.reachability import check_neighbours, check_reach
from megatron_ring.settings.run_settings import RunSettings

_MAX_LINKS_SHOWN = 16


def run_startup_check(setup: RunSettings, groups: ProcessGroups, consensus: Consensus) -> None:
    """Run the self-test and print one line on rank 0.

    Raises a problem of any rank on every rank, after all have left their groups.
    """
    with abort_collectively():
        report = self_test(setup, groups, consensus)
    if consensus.rank == 0:
        print(report.summary())


def run_self_test_only(config: Config, environment: Environment, consensus: Consensus) -> None:
    """Run the self-test without training, print the full report, and leave the process groups.

    Data is checked if --data-path names it. Raises as ``run_startup_check`` does.
    """
    with abort_collectively():
        check_options_and_code(config, consensus)
        setup = run_checked(consensus, lambda: resolve_settings(config, environment.world_size))
        check_layout(setup.layout, consensus)
        if config.data.data_path:
            run_checked(consensus, lambda: Dataset.open(config.data, config.training.seed))
            check_data(config.data, consensus)
        groups = ProcessGroups.build(setup.grid, environment.global_rank)
        report = self_test(setup, groups, consensus)
    if consensus.rank == 0:
        print(report.full_text())
    leave_processes()


@dataclass(frozen=True)
class SelfTestReport:
    """The result of a self-test that passed, the same on every rank.

    processes: by rank. errors: the largest of any rank. links: of all rings, the slowest first;
    empty where rings have one rank.
    """

    setup: RunSettings
    processes: list[ProcessId]
    errors: Errors
    links: list[Link]

    def summary(self) -> str:
        """Return one line for the start of a run, and one more if links are slow."""
        ranks = len(self.processes)
        agree = f"{ranks} ranks agree" if ranks > 1 else "1 rank"
        text = f"{agree}; {self._equation()} to {max(self.errors):.0e}"
        if self.links:
            text += (
                f"; {megabytes(median(self.links))} MB/s a hop of {message_bytes(self.setup):,} "
                f"bytes, slowest {self.links[0]}"
            )
        return "\n".join([f"self-test        {text}", *self._warnings()])

    def full_text(self) -> str:
        """Return all results, for a run of the self-test alone."""
        limits = zip(Errors._fields, self.errors, error_limits(self.setup))
        errors = ", ".join(f"{name} {error:.1e} ({limit:.1e})" for name, error, limit in limits)
        lines = [
            "processes        the same options and code, each where the grid has it: "
            f"{describe_processes(self.processes)}",
            f"attention        {self._equation()}, kernel {self.setup.kernel.name} in "
            f"{self.setup.precision.name}: error (limit) {errors}",
        ]
        if self.links:
            size = f"{message_bytes(self.setup):,} bytes"
            lines.append(f"hops             {size}; MB/s, the slowest first:")
            lines += [f"                 {link}" for link in self.links[:_MAX_LINKS_SHOWN]]
        return "\n".join([*lines, *self._warnings(), "self-test        passed"])

    def _equation(self) -> str:
        if self.setup.grid.context > 1:
            return "ring = local attention"
        return "attention = plain attention"

    def _warnings(self) -> list[str]:
        slow = slow_links(self.links)
        if not slow:
            return []
        shown = ", ".join(map(str, slow[:_MAX_LINKS_SHOWN]))
        more = len(slow) - _MAX_LINKS_SHOWN
        if more > 0:
            shown += f" and {more} more"
        return [
            f"slow links       {shown}: MB/s, less than half of the median within a host or "
            "between hosts; check the network, and what else uses it"
        ]


def self_test(setup: RunSettings, groups: ProcessGroups, consensus: Consensus) -> SelfTestReport:
    """Raise ConfigError, with the same message on every rank, if a check fails on any rank.

    Communicates in all groups and blocks. Options, code and data must have been compared already
    (consistency.py): ranks that differ may not even have the same groups.
    """
    processes = consensus.gather(lambda: ProcessId.here(consensus.rank))
    check_neighbours(setup.grid, groups, processes, consensus, setup.device)
    if groups.ring_links and setup.config.parallel.ring_timeout:
        check_reach(consensus)
    errors = check_attention(setup, groups, processes, consensus)
    links = measure_links(setup, groups, processes, consensus)
    links = sorted(links, key=lambda link: link.bytes_per_second)
    return SelfTestReport(setup, processes, errors, links)
