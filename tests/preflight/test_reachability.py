"""Ranks that cannot connect to each other are named before training starts."""

import re
import socket

from megatron_ring.errors import ConfigError
from megatron_ring.monitoring import intercom
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.preflight.reachability import check_reach, ranks_to_try
from tests.distributed import run_ranks

HOSTS = ["a", "a", "b", "b", "c"]


def test_every_host_tries_every_host_once():
    pairs = [
        (HOSTS[rank], HOSTS[other]) for rank in range(5) for other in ranks_to_try(rank, HOSTS)
    ]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) >= {(a, b) for a in "abc" for b in "abc" if a != b}
    assert all(rank not in ranks_to_try(rank, HOSTS) for rank in range(5))


def test_the_ranks_of_a_host_share_the_other_hosts():
    networks = [f"host {rank // 8}" for rank in range(8 * 128)]
    assert {len(ranks_to_try(rank, networks)) for rank in range(0, len(networks), 37)} <= {15, 16}
    tried = [other for rank in range(len(networks)) for other in ranks_to_try(rank, networks)]
    assert max(map(tried.count, tried[::500])) <= 128, "no rank gets many calls"


def refuse_connection(*_, **__):
    raise OSError(113, "No route to host")


def check(rank: int, world_size: int, unreachable: bool) -> list[str]:
    """Return the problems that this rank reports, each rank being on a host of its own."""
    intercom.network_identity = intercom.pid_identity = lambda: f"host {rank}"
    if unreachable and rank == 1:
        socket.create_connection = refuse_connection
    try:
        check_reach(Consensus.build())
    except ConfigError as error:
        return error.problems
    return []


def test_ranks_that_reach_each_other_pass():
    assert run_ranks(3, check, False) == [[]] * 3


def test_pairs_that_cannot_connect_are_named_on_all_ranks_with_the_remedy():
    first, second, third = run_ranks(3, check, True)
    assert first == second == third
    assert len(first) == 3
    for problem, other in zip(first, "02"):
        assert re.match(
            rf"rank 1 \(\S+, pid \d+\) cannot reach rank {other} .* No route to host", problem
        )
    assert "GLOO_SOCKET_IFNAME" in first[-1]
    assert "--ring-timeout 0" in first[-1]
