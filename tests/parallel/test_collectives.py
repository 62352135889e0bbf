import time
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_ring.parallel import collectives, same_machine
from megatron_ring.parallel.collectives import (
    ProcessGroups,
    RingExchange,
    let_links_outlast_suspensions,
)
from megatron_ring.parallel.grid import Grid
from tests.distributed import run_ranks

# By world size; the rings have two, three and four members.
GRIDS = {3: [Grid(ring=3)], 4: [Grid(ring=4), Grid(data=2, ring=2), Grid(data=4)]}

each_grid = pytest.mark.parametrize(
    "grid", [grid for grids in GRIDS.values() for grid in grids], ids=str
)
each_way = pytest.mark.parametrize("way", ["network", "tickets"])
each_ring = pytest.mark.parametrize(
    "grid", [grid for grids in GRIDS.values() for grid in grids if grid.ring > 1], ids=str
)


def talk(rank: int, world_size: int) -> dict[Grid, dict]:
    """On every grid: the sum over the ranks' numbers, and what transfers in flight together bring."""
    heard = {}
    for grid in GRIDS[world_size]:
        groups = ProcessGroups.build(grid, rank)
        summed = torch.tensor([float(rank), 1.0])
        returned = groups.sum(summed)
        heard[grid] = {"sum": returned.tolist(), "in place": returned is summed}
        if groups.ring_links:
            heard[grid] |= {
                way: send_kv_or_q(exchange, rank)
                for way, exchange in exchanges(groups.ring_links).items()
            }
    return heard


def exchanges(links: tuple) -> dict[str, RingExchange]:
    """As they are between machines, and within one."""
    within = RingExchange.over(links)
    return {"network": replace(within, fetcher=None), "tickets": within}


def send_kv_or_q(exchange: RingExchange, rank: int) -> dict:
    members = exchange.members
    sent = [torch.full((1000, 3), 10.0 * rank + number) for number in range(3)]
    transfers = [exchange.start(tensor) for tensor in sent]
    received = [transfer.wait() for transfer in reversed(transfers)][::-1]
    distances = [each for each in range(1 - len(members), len(members)) if each]
    farther = [
        exchange.start(torch.full((1000,), 10.0 * rank + distance), distance)
        for distance in distances
    ]
    return go_around(exchange, rank) | {
        "from afar": {
            distance: transfer.wait().unique().tolist()
            for distance, transfer in zip(distances, farther)
        },
        "members": members,
        "by tickets": exchange.fetcher is not None,
        "received": [tensor.unique().tolist() for tensor in received],
        "sent": [tensor.unique().tolist() for tensor in sent],
        "shapes": {tuple(tensor.shape) for tensor in received},
    }


def go_around(exchange: RingExchange, rank: int) -> dict:
    """A tensor is passed on for six rounds, as keys are."""
    own = tensor = torch.full((100,), float(rank))
    values, arrived = [], []
    for _ in range(6):
        tensor = exchange.start(tensor).wait()
        values.append(tensor.unique().tolist())
        arrived.append(tensor)  # held, so that another has another id
    return {
        "around": values,
        "places": len({id(tensor) for tensor in arrived}),
        "own": own.unique().tolist(),
    }


@pytest.fixture(scope="module")
def heard() -> dict[int, list[dict]]:
    """What each rank heard, by world size."""
    return {world_size: run_ranks(world_size, talk) for world_size in GRIDS}


@each_grid
def test_sums_are_over_data_and_context(grid, heard):
    total = [sum(range(grid.world_size)), grid.world_size]
    assert [rank[grid]["sum"] for rank in heard[grid.world_size]] == [total] * grid.world_size
    assert all(rank[grid]["in place"] for rank in heard[grid.world_size])


@each_way
@each_ring
def test_a_tensor_goes_to_the_next_rank_of_its_ring(grid, way, heard):
    for rank, found in enumerate(heard[grid.world_size]):
        ring = next(members for members in grid.members("ring") if rank in members)
        previous = ring[ring.index(rank) - 1]
        assert found[grid][way]["members"] == tuple(ring)
        assert found[grid][way]["received"] == [[10.0 * previous + number] for number in range(3)]


@each_way
@each_ring
def test_a_tensor_goes_any_way_on_and_back(grid, way, heard):
    """All distances around the ring in flight together, as when a ring that is cut sends its sums home."""
    for rank, found in enumerate(heard[grid.world_size]):
        ring = next(members for members in grid.members("ring") if rank in members)
        assert set(found[grid][way]["from afar"]) == {
            *range(1 - grid.ring, 0),
            *range(1, grid.ring),
        }
        for distance, received in found[grid][way]["from afar"].items():
            sender = ring[(ring.index(rank) - distance) % grid.ring]
            assert received == [10.0 * sender + distance]


@each_way
@each_ring
def test_what_goes_around_arrives_in_two_places_in_turn(grid, way, heard):
    """So much memory is enough for any number of hops; what a rank had of its own is not among it."""
    for rank, found in enumerate(heard[grid.world_size]):
        ring = next(members for members in grid.members("ring") if rank in members)
        at = ring.index(rank)
        assert found[grid][way]["around"] == [
            [float(ring[(at - hop) % grid.ring])] for hop in range(1, 7)
        ]
        assert found[grid][way]["places"] == 2
        assert found[grid][way]["own"] == [float(rank)]


@each_way
@each_ring
def test_what_is_sent_stays_as_it_was(grid, way, heard):
    for rank, found in enumerate(heard[grid.world_size]):
        assert found[grid][way]["sent"] == [[10.0 * rank + number] for number in range(3)]
        assert found[grid][way]["shapes"] == {(1000, 3)}


@each_ring
def test_within_a_machine_tickets_travel(grid, heard):
    for found in heard[grid.world_size]:
        assert {way: found[grid][way]["by tickets"] for way in ("network", "tickets")} == {
            "network": False,
            "tickets": True,
        }


def test_alone_a_process_sums_to_itself_and_has_no_ring():
    groups = ProcessGroups.build(Grid(), 0)
    assert groups == ProcessGroups()
    assert groups.sum(torch.tensor(5.0)) == 5.0


class Options:
    """A stand-in for those of NCCL, which torch built for CPUs lacks."""

    def __init__(self, is_high_priority_stream: bool = False):
        self.is_high_priority_stream = is_high_priority_stream
        self._timeout = timedelta(minutes=10)


@pytest.fixture
def built(monkeypatch) -> list[SimpleNamespace]:
    """What torch was asked for when groups were built: ranks, timeout and options of each."""
    asked = []

    def build(ranks, timeout, pg_options):
        asked.append(SimpleNamespace(ranks=ranks, timeout=timeout, options=pg_options))
        return object(), []

    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", build)
    monkeypatch.setattr(dist, "barrier", lambda group: None)
    return asked


@pytest.mark.parametrize("backend", ["cuda:nccl", "cpu:gloo,cuda:nccl"])
@pytest.mark.parametrize(("ring_timeout", "seconds"), [(0, 600), (30, 90)])
def test_with_nccl_each_link_has_a_high_priority_stream_and_nothing_else_has(
    ring_timeout, seconds, backend, built, monkeypatch
):
    monkeypatch.setattr(dist, "get_backend_config", lambda: backend)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    ProcessGroups.build(Grid(data=2, ring=2), 0, ring_timeout)
    everybody, first, second = built
    assert [first.ranks, second.ranks] == [[[0, 1], [2, 3]]] * 2
    assert first.options.is_high_priority_stream
    assert second.options.is_high_priority_stream
    assert first.options is not second.options, (
        "torch notes a group's name and ranks in its options"
    )
    assert {first.options._timeout, second.options._timeout} == {timedelta(seconds=seconds)}
    assert {first.timeout, second.timeout} == {timedelta(seconds=seconds) if ring_timeout else None}
    assert everybody.options is None


def test_without_nccl_a_link_has_no_options(built, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:gloo")
    monkeypatch.setattr(collectives, "probe_shared_memory", lambda group: None)
    ProcessGroups.build(Grid(ring=2), 0)
    assert [each.options for each in built] == [None] * len(built)


def wait_longer_than_the_limit(rank: int, world_size: int, within_the_machine: bool) -> list[float]:
    """What arrives in a ring whose links have a limit of a second, of which rank 1 is late for more."""
    links = tuple(dist.new_group(timeout=timedelta(seconds=1)) for _ in range(2))
    if within_the_machine:
        same_machine.probe_shared_memory(links[0])
    let_links_outlast_suspensions(links)
    exchange = RingExchange.over(links)
    dist.barrier()
    if rank == 1:
        time.sleep(2.5)
    return exchange.start(torch.tensor([float(rank)])).wait().tolist()


@pytest.mark.parametrize("within_the_machine", [False, True])
def test_the_watchdog_and_not_gloo_limits_waits_in_the_ring(within_the_machine):
    """gloo counts suspensions as waiting."""
    assert run_ranks(2, wait_longer_than_the_limit, within_the_machine) == [[1.0], [0.0]]
