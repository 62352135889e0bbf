"""Whether ranks can connect to each other where the watchdog asks them.

One rank of each host tries each other host.
"""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from megatron_ring.errors import ConfigError
from megatron_ring.monitoring.intercom import Intercom, NoAnswer
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.process_id import Process
from megatron_ring.parallel.progress import ProgressTracker

# A host's name has at most 64 letters.
_BYTES_OF_PAPERS = 128
_NAMED_AT_MOST = 8


def check_neighbours(
    grid: Grid, groups: ProcessGroups, processes: list[Process], consensus: Consensus, device: str
) -> None:
    """Raises ConfigError on every rank where any meets another process than the grid says. ``processes``: by rank.

    Talks in all of ``groups``; blocks until all have met.
    """
    here = processes[consensus.rank]
    met = list(_met(grid, groups, here, device))
    strangers = [
        f"{here} meets {found or 'nobody'} as {role}, where the grid has {processes[expected]}."
        for role, expected, found in met
        if found != processes[expected]
    ]
    if problems := [
        problem for of_rank in consensus.gather(lambda: strangers) for problem in of_rank
    ]:
        more = len(problems) - _NAMED_AT_MOST
        problems = problems[:_NAMED_AT_MOST] + ([f"And {more} more."] if more > 0 else [])
        raise ConfigError(
            [*problems, "Start the ranks in the order of their hosts, each number once."]
        )


def ring_exchange(groups: ProcessGroups) -> RingExchange | None:
    """The exchange of this process's ring; None in a ring of one."""
    return RingExchange.over(groups.ring_links) if groups.ring_links else None


def _met(
    grid: Grid, groups: ProcessGroups, here: Process, device: str
) -> Iterator[tuple[str, int, Process | None]]:
    """(role, the rank that the grid has in it, who is there)."""
    papers = _identity_message(here, device)
    if exchange := ring_exchange(groups):
        ring = _own(grid, here.global_rank, "ring")
        place = ring.index(here.global_rank)
        for role, distance in {
            "the rank before it in its ring": 1,
            "the rank after it in its ring": -1,
        }.items():
            yield (
                role,
                ring[(place - distance) % len(ring)],
                _read(exchange.start(papers, distance).wait()),
            )
    for name, group, axes in (
        ("Ulysses", groups.ulysses, ("ulysses",)),
        ("tensor", groups.tensor, ("tensor",)),
        ("data x context", groups.data_context, ("data", "ring", "ulysses")),
        ("pipeline x tensor", groups.model, ("pipe", "tensor")),
    ):
        if group is not None:
            yield from _members(name, group, _own(grid, here.global_rank, *axes), papers)


def _members(
    name: str, group: dist.ProcessGroup, expected: list[int], papers: torch.Tensor
) -> Iterator[tuple[str, int, Process | None]]:
    shown = [torch.empty_like(papers) for _ in range(group.size())]
    dist.all_gather(shown, papers, group=group)
    found = [_read(each) for each in shown] + [None] * (len(expected) - len(shown))
    for place, (rank, process) in enumerate(zip(expected, found)):
        yield f"member {place} of its {name} group", rank, process


def _own(grid: Grid, global_rank: int, *axes: str) -> list[int]:
    return next(members for members in grid.members(*axes) if global_rank in members)


def _identity_message(process: Process, device: str) -> torch.Tensor:
    """(128,) uint8: text, because a name is no number."""
    text = f"{process.global_rank} {process.pid} {process.host}".encode().ljust(_BYTES_OF_PAPERS)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def _read(papers: torch.Tensor) -> Process:
    global_rank, pid, host = bytes(papers.tolist()).decode().split()
    return Process(int(global_rank), host, int(pid))


_CALLS_AT_ONCE = 32
_NAMED_AT_MOST = 8


def check_reach(consensus: Consensus) -> None:
    """Raises ConfigError on every rank, naming the pairs, where a rank cannot connect to another.

    Collective, over ``consensus``; blocks until all have tried.
    """
    intercom = Intercom(consensus, ProgressTracker().read, lambda suspect: None)
    with contextlib.closing(intercom):
        asked = to_ask(consensus.rank, intercom.networks)
        with ThreadPoolExecutor(_CALLS_AT_ONCE) as calls:
            answers = list(calls.map(intercom.ask, asked))
        failed = [
            f"{intercom.own} cannot reach {member} at {member.address}, port {member.port}: it {answer.reason}."
            for member, answer in zip((intercom.members[rank] for rank in asked), answers)
            if isinstance(answer, NoAnswer)
        ]
        problems = [problem for of_rank in consensus.gather(lambda: failed) for problem in of_rank]
    if problems:
        more = len(problems) - _NAMED_AT_MOST
        problems = problems[:_NAMED_AT_MOST] + ([f"And {more} more pairs."] if more > 0 else [])
        remedy = (
            "Ranks connect to each other by TCP to find out which of them is stuck or has died. Set GLOO_SOCKET_IFNAME "
            "to the interface that joins the hosts, open the ports between them, or set --ring-timeout 0."
        )
        raise ConfigError([*problems, remedy])


def to_ask(rank: int, networks: Sequence[str]) -> list[int]:
    """The ranks that ``rank`` tries to reach. networks: by rank; ranks of equal ones share a host.

    Together the ranks of a host try one rank of every host, their own included, so that a rank has
    few to try.
    """
    hosts: dict[str, list[int]] = {}
    for other, network in enumerate(networks):
        hosts.setdefault(network, []).append(other)
    own = hosts[networks[rank]]
    asked = [
        members[(rank + 1) % len(members)]
        for number, members in enumerate(hosts.values())
        if number % len(own) == own.index(rank)
    ]
    return [other for other in asked if other != rank]
