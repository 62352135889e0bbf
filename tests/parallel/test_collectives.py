"""Process groups and ring exchanges between real ranks, over the network and by tickets."""

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
    leave_link_timeouts_to_watchdog,
)
from megatron_ring.parallel.grid import Grid
from tests.distributed import run_ranks

# By world size; the rings have two, three and four members.
GRIDS = {3: [Grid(ring=3)], 4: [Grid(ring=4), Grid(data=2, ring=2), Grid(data=4)]}
ALL_GRIDS = [grid for grids in GRIDS.values() for grid in grids]

each_grid = pytest.mark.parametrize("grid", ALL_GRIDS, ids=str)
each_transport = pytest.mark.parametrize("transport", ["network", "tickets"])
each_ring = pytest.mark.parametrize("grid", [grid for grid in ALL_GRIDS if grid.ring > 1], ids=str)


def communicate(rank: int, world_size: int) -> dict[Grid, dict]:
    """Return, by grid, a sum over the ranks and, by transport, the results of transfers."""
    results = {}
    for grid in GRIDS[world_size]:
        groups = ProcessGroups.build(grid, rank)
        summed = torch.tensor([float(rank), 1.0])
        returned = groups.sum(summed)
        results[grid] = {"sum": returned.tolist(), "in place": returned is summed}
        if groups.ring_links:
            for transport, exchange in exchanges(groups.ring_links).items():
                results[grid][transport] = transfer_results(exchange, rank)
    return results


def exchanges(links: tuple) -> dict[str, RingExchange]:
    """Return an exchange as between machines, and one as within a machine."""
    within_machine = RingExchange.over(links)
    return {"network": replace(within_machine, peer_reader=None), "tickets": within_machine}


def transfer_results(exchange: RingExchange, rank: int) -> dict:
    """Return what transfers in flight together bring, to the next rank and to any other."""
    members = exchange.members
    sent = [torch.full((1000, 3), 10.0 * rank + number) for number in range(3)]
    transfers = [exchange.start(tensor) for tensor in sent]
    received = [transfer.wait() for transfer in reversed(transfers)][::-1]
    distances = [distance for distance in range(1 - len(members), len(members)) if distance]
    by_distance = {
        distance: exchange.start(torch.full((1000,), 10.0 * rank + distance), distance)
        for distance in distances
    }
    return send_around(exchange, rank) | {
        "by distance": {
            distance: transfer.wait().unique().tolist()
            for distance, transfer in by_distance.items()
        },
        "members": members,
        "by tickets": exchange.peer_reader is not None,
        "received": [tensor.unique().tolist() for tensor in received],
        "sent": [tensor.unique().tolist() for tensor in sent],
        "shapes": {tuple(tensor.shape) for tensor in received},
    }


def send_around(exchange: RingExchange, rank: int) -> dict:
    """Send a tensor on for six hops, as keys are."""
    own = torch.full((100,), float(rank))
    tensor = own
    values = []
    received = []
    for _ in range(6):
        tensor = exchange.start(tensor).wait()
        values.append(tensor.unique().tolist())
        received.append(tensor)  # kept alive, so that ids stay unique
    return {
        "around": values,
        "buffers": len({id(tensor) for tensor in received}),
        "own": own.unique().tolist(),
    }


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict]]:
    """The results of every rank, by world size."""
    return {world_size: run_ranks(world_size, communicate) for world_size in GRIDS}


def ring_of(grid: Grid, rank: int) -> list[int]:
    return next(members for members in grid.members("ring") if rank in members)


@each_grid
def test_sums_are_over_data_and_context(grid, results):
    total = [sum(range(grid.world_size)), grid.world_size]
    of_ranks = results[grid.world_size]
    assert [of_rank[grid]["sum"] for of_rank in of_ranks] == [total] * grid.world_size
    assert all(of_rank[grid]["in place"] for of_rank in of_ranks)


@each_transport
@each_ring
def test_a_tensor_goes_to_the_next_rank_of_its_ring(grid, transport, results):
    for rank, of_rank in enumerate(results[grid.world_size]):
        ring = ring_of(grid, rank)
        previous = ring[ring.index(rank) - 1]
        result = of_rank[grid][transport]
        assert result["members"] == tuple(ring)
        assert result["received"] == [[10.0 * previous + number] for number in range(3)]


@each_transport
@each_ring
def test_a_tensor_can_be_sent_any_distance_on_and_back(grid, transport, results):
    """All distances are in flight together, as when a ring that was cut returns accumulators."""
    distances = {*range(1 - grid.ring, 0), *range(1, grid.ring)}
    for rank, of_rank in enumerate(results[grid.world_size]):
        ring = ring_of(grid, rank)
        by_distance = of_rank[grid][transport]["by distance"]
        assert set(by_distance) == distances
        for distance, received in by_distance.items():
            sender = ring[(ring.index(rank) - distance) % grid.ring]
            assert received == [10.0 * sender + distance]


@each_transport
@each_ring
def test_two_receive_buffers_serve_any_number_of_hops(grid, transport, results):
    """A rank's own tensor is not used as a buffer."""
    for rank, of_rank in enumerate(results[grid.world_size]):
        ring = ring_of(grid, rank)
        position = ring.index(rank)
        result = of_rank[grid][transport]
        senders = [ring[(position - hop) % grid.ring] for hop in range(1, 7)]
        assert result["around"] == [[float(sender)] for sender in senders]
        assert result["buffers"] == 2
        assert result["own"] == [float(rank)]


@each_transport
@each_ring
def test_sent_tensors_stay_unchanged(grid, transport, results):
    for rank, of_rank in enumerate(results[grid.world_size]):
        result = of_rank[grid][transport]
        assert result["sent"] == [[10.0 * rank + number] for number in range(3)]
        assert result["shapes"] == {(1000, 3)}


@each_ring
def test_within_a_machine_links_carry_tickets(grid, results):
    for of_rank in results[grid.world_size]:
        assert not of_rank[grid]["network"]["by tickets"]
        assert of_rank[grid]["tickets"]["by tickets"]


def test_a_single_process_has_no_groups_and_sums_nothing():
    groups = ProcessGroups.build(Grid(), 0)
    assert groups == ProcessGroups()
    assert groups.sum(torch.tensor(5.0)) == 5.0


class Options:
    """A stand-in for NCCL's options, which torch built for CPUs lacks."""

    def __init__(self, is_high_priority_stream: bool = False):
        self.is_high_priority_stream = is_high_priority_stream
        self._timeout = timedelta(minutes=10)


@pytest.fixture
def built(monkeypatch) -> list[SimpleNamespace]:
    """The ranks, timeout and options of each group that was requested from torch."""
    requests = []

    def build(ranks, timeout, pg_options):
        requests.append(SimpleNamespace(ranks=ranks, timeout=timeout, options=pg_options))
        return object(), []

    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", build)
    monkeypatch.setattr(dist, "barrier", lambda group: None)
    return requests


@pytest.mark.parametrize("backend", ["cuda:nccl", "cpu:gloo,cuda:nccl"])
@pytest.mark.parametrize(("ring_timeout", "seconds"), [(0, 600), (30, 90)])
def test_with_nccl_only_the_links_have_high_priority_streams(
    ring_timeout, seconds, backend, built, monkeypatch
):
    monkeypatch.setattr(dist, "get_backend_config", lambda: backend)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    ProcessGroups.build(Grid(data=2, ring=2), 0, ring_timeout)
    data_context, first, second = built
    assert [first.ranks, second.ranks] == [[[0, 1], [2, 3]]] * 2
    assert first.options.is_high_priority_stream
    assert second.options.is_high_priority_stream
    assert first.options is not second.options, (
        "torch writes a group's name and ranks to its options"
    )
    assert {first.options._timeout, second.options._timeout} == {timedelta(seconds=seconds)}
    assert {first.timeout, second.timeout} == {timedelta(seconds=seconds) if ring_timeout else None}
    assert data_context.options is None


def test_every_rank_requests_the_same_groups_in_the_same_order(built, monkeypatch):
    """With NCCL, torch splits groups off the default one, which is a call of all ranks."""
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:gloo")
    monkeypatch.setattr(collectives, "probe_shared_memory", lambda group: None)
    grid = Grid(data=2, ring=2, tensor=2, pipe=2)
    requests = []
    for rank in range(grid.world_size):
        ProcessGroups.build(grid, rank)
        requests.append([request.ranks for request in built])
        built.clear()
    assert len(requests[0]) == 5
    assert all(of_rank == requests[0] for of_rank in requests)
    for groups in requests[0]:
        assert sorted(rank for group in groups for rank in group) == list(range(16))


def test_without_nccl_links_have_no_options(built, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:gloo")
    monkeypatch.setattr(collectives, "probe_shared_memory", lambda group: None)
    ProcessGroups.build(Grid(ring=2), 0)
    assert [request.options for request in built] == [None] * len(built)


def wait_longer_than_the_timeout(rank: int, world_size: int, same_host: bool) -> list[float]:
    """Return what arrives over links with a timeout of 1 s if rank 1 is 2.5 s late."""
    links = tuple(dist.new_group(timeout=timedelta(seconds=1)) for _ in range(2))
    if same_host:
        same_machine.probe_shared_memory(links[0])
    leave_link_timeouts_to_watchdog(links)
    exchange = RingExchange.over(links)
    dist.barrier()
    if rank == 1:
        time.sleep(2.5)
    return exchange.start(torch.tensor([float(rank)])).wait().tolist()


@pytest.mark.parametrize("same_host", [False, True])
def test_with_a_watchdog_gloo_does_not_limit_waits_in_the_ring(same_host):
    """gloo would count suspensions as waiting time."""
    assert run_ranks(2, wait_longer_than_the_timeout, same_host) == [[1.0], [0.0]]
