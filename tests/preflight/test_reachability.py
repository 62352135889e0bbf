"""Ranks that cannot connect to each other are named before the run begins."""

import re
import socket

from megatron_ring.errors import ConfigError
from megatron_ring.monitoring import intercom
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.preflight.reachability import check_reach, to_ask
from tests.distributed import run_ranks

HOSTS = ["a", "a", "b", "b", "c"]


def test_every_host_is_tried_by_every_host_once():
    pairs = [(HOSTS[rank], HOSTS[other]) for rank in range(5) for other in to_ask(rank, HOSTS)]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) >= {(a, b) for a in "abc" for b in "abc" if a != b}
    assert all(rank not in to_ask(rank, HOSTS) for rank in range(5))


def test_many_hosts_are_shared_out_among_the_ranks_of_one():
    networks = [f"host {rank // 8}" for rank in range(8 * 128)]
    assert {len(to_ask(rank, networks)) for rank in range(0, len(networks), 37)} <= {15, 16}
    asked = [other for rank in range(len(networks)) for other in to_ask(rank, networks)]
    assert max(map(asked.count, asked[::500])) <= 128, "no rank is asked by many"


def no_route(*_, **__):
    raise OSError(113, "No route to host")


def check(rank: int, world_size: int, unreachable: bool) -> list[str]:
    """What is wrong according to this rank, where each rank is on a host of its own."""
    intercom.network_identity = intercom.pid_identity = lambda: f"host {rank}"
    if unreachable and rank == 1:
        socket.create_connection = no_route
    try:
        check_reach(Consensus.build())
    except ConfigError as error:
        return error.problems
    return []


def test_ranks_that_reach_each_other_pass():
    assert run_ranks(3, check, False) == [[]] * 3


def test_the_pairs_that_do_not_are_named_on_all_ranks_with_the_remedy():
    first, second, third = run_ranks(3, check, True)
    assert first == second == third
    assert len(first) == 3
    for problem, other in zip(first, "02"):
        assert re.match(
            rf"rank 1 \(\S+, pid \d+\) cannot reach rank {other} .* No route to host", problem
        )
    assert "GLOO_SOCKET_IFNAME" in first[-1]
    assert "--ring-timeout 0" in first[-1]
