"""Checks that ranks reach each other and that process groups have the members of the grid.

Every process sends its identity (global rank, host name, process id) through each of its groups,
the way the run's own tensors travel: around the ring in both directions by the ring exchange, in
the other groups by an all-gather, which returns them in member order. Apart from these groups, the
watchdog needs TCP connections between ranks; one rank of each host tries every other host.
"""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ring.errors import ConfigError
from megatron_ring.monitoring.intercom import Intercom, NoResponse
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.process_id import ProcessId
from megatron_ring.parallel.progress import ProgressTracker

# A host name has at most 64 characters.
_IDENTITY_BYTES = 128
_MAX_CONCURRENT_CALLS = 32
_MAX_PROBLEMS_SHOWN = 8


class _Member(NamedTuple):
    """A member of one of this process's groups, as expected and as found.

    role: its place in the group. expected_rank: its global rank by the grid. process: the process
    that was found there, None where the group is too small to have this member.
    """

    role: str
    expected_rank: int
    process: ProcessId | None


def check_neighbours(
    grid: Grid, groups: ProcessGroups, processes: list[ProcessId], consensus: Consensus, device: str
) -> None:
    """Raise ConfigError on every rank if any finds another process in a group than the grid has.

    ``processes``: by global rank. Communicates in all of ``groups``; blocks until all ranks have.
    """
    this_process = processes[consensus.rank]
    mismatches = []
    for member in _members(grid, groups, this_process, device):
        expected = processes[member.expected_rank]
        if member.process != expected:
            mismatches.append(
                f"{this_process} has {member.process or 'no process'} as {member.role}, where the "
                f"grid has {expected}."
            )
    problems = _from_all_ranks(mismatches, consensus)
    if problems:
        remedy = "Start the ranks in the order of their hosts, each rank number once."
        raise ConfigError([*_shortened(problems, ""), remedy])


def ring_exchange(groups: ProcessGroups) -> RingExchange | None:
    """Return the exchange of this process's ring; None if the ring has one rank."""
    return RingExchange.over(groups.ring_links) if groups.ring_links else None


def _members(
    grid: Grid, groups: ProcessGroups, this_process: ProcessId, device: str
) -> Iterator[_Member]:
    """Exchange identities in every group of this process; blocks."""
    identity = _identity_message(this_process, device)
    exchange = ring_exchange(groups)
    if exchange:
        yield from _ring_neighbours(grid, exchange, this_process, identity)
    for name, group, axes in (
        ("Ulysses", groups.ulysses, ("ulysses",)),
        ("tensor", groups.tensor, ("tensor",)),
        ("data x context", groups.data_context, ("data", "ring", "ulysses")),
        ("pipeline x tensor", groups.model, ("pipe", "tensor")),
    ):
        if group is not None:
            expected = _ranks_of_group(grid, this_process.global_rank, *axes)
            yield from _group_members(name, group, expected, identity)


def _ring_neighbours(
    grid: Grid, exchange: RingExchange, this_process: ProcessId, identity: torch.Tensor
) -> Iterator[_Member]:
    ring = _ranks_of_group(grid, this_process.global_rank, "ring")
    position = ring.index(this_process.global_rank)
    for role, distance in (
        ("the rank before it in its ring", 1),
        ("the rank after it in its ring", -1),
    ):
        expected_rank = ring[(position - distance) % len(ring)]
        received = exchange.start(identity, distance).wait()
        yield _Member(role, expected_rank, _parse_identity(received))


def _group_members(
    name: str, group: dist.ProcessGroup, expected: list[int], identity: torch.Tensor
) -> Iterator[_Member]:
    received = [torch.empty_like(identity) for _ in range(group.size())]
    dist.all_gather(received, identity, group=group)
    processes: list[ProcessId | None] = [_parse_identity(message) for message in received]
    processes += [None] * (len(expected) - len(processes))
    for position, (rank, process) in enumerate(zip(expected, processes)):
        yield _Member(f"member {position} of its {name} group", rank, process)


def _ranks_of_group(grid: Grid, global_rank: int, *axes: str) -> list[int]:
    return next(members for members in grid.members(*axes) if global_rank in members)


def _identity_message(process: ProcessId, device: str) -> torch.Tensor:
    """(128,) uint8: the identity as text, padded with spaces."""
    text = f"{process.global_rank} {process.pid} {process.host}".encode().ljust(_IDENTITY_BYTES)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def _parse_identity(message: torch.Tensor) -> ProcessId:
    global_rank, pid, host = bytes(message.tolist()).decode().split()
    return ProcessId(int(global_rank), host, int(pid))


def check_reach(consensus: Consensus) -> None:
    """Raise ConfigError on every rank, naming the pairs, if a rank cannot connect to another.

    Collective over ``consensus``; blocks until all ranks have tried.
    """
    intercom = Intercom(consensus, ProgressTracker().read, lambda suspect: None)
    with contextlib.closing(intercom):
        ranks = ranks_to_try(consensus.rank, intercom.networks)
        with ThreadPoolExecutor(_MAX_CONCURRENT_CALLS) as pool:
            answers = list(pool.map(intercom.ask, ranks))
        failures = []
        for rank, answer in zip(ranks, answers):
            if isinstance(answer, NoResponse):
                member = intercom.members[rank]
                failures.append(
                    f"{intercom.own} cannot reach {member} at {member.address}, port "
                    f"{member.port}: it {answer.reason}."
                )
        problems = _from_all_ranks(failures, consensus)
    if problems:
        remedy = (
            "Ranks connect to each other by TCP to find out which of them is stuck or has died. "
            "Set GLOO_SOCKET_IFNAME to the interface that connects the hosts, open the ports "
            "between them, or set --ring-timeout 0."
        )
        raise ConfigError([*_shortened(problems, " pairs"), remedy])


def ranks_to_try(rank: int, networks: Sequence[str]) -> list[int]:
    """Return the ranks that ``rank`` tries to reach.

    ``networks``: an identity of each rank's host, by rank. The ranks of a host together try one
    rank of every host, their own included, so that each has few to try.
    """
    hosts: dict[str, list[int]] = {}
    for other, network in enumerate(networks):
        hosts.setdefault(network, []).append(other)
    own_host = hosts[networks[rank]]
    chosen = []
    for number, members in enumerate(hosts.values()):
        if number % len(own_host) == own_host.index(rank):
            chosen.append(members[(rank + 1) % len(members)])
    return [other for other in chosen if other != rank]


def _from_all_ranks(problems: list[str], consensus: Consensus) -> list[str]:
    return [problem for of_rank in consensus.gather(lambda: problems) for problem in of_rank]


def _shortened(problems: list[str], unit: str) -> list[str]:
    """Return the first problems and, if there are more, how many."""
    more = len(problems) - _MAX_PROBLEMS_SHOWN
    shown = problems[:_MAX_PROBLEMS_SHOWN]
    return [*shown, f"And {more} more{unit}."] if more > 0 else shown
