"""Whether ranks can connect to each other where the watchdog asks them.

One rank of each host tries each other host.
"""

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_ring.errors import ConfigError
from megatron_ring.monitoring.intercom import Intercom, NoAnswer
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.progress import ProgressTracker

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
