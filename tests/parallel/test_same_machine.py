"""Messages read from the sender's memory: what is read, and when the network is used instead."""

import os
import re
import weakref

import pytest
import torch
import torch.distributed as dist

from megatron_ring.parallel import same_machine
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.same_machine import (
    MemoryUnreadable,
    peer_memory_reader,
    read_peer_memory,
    ticket_for,
)
from tests.distributed import run_ranks


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8], ids=str
)
def test_a_dense_tensor_is_read_in_its_order_in_memory(dtype):
    sent = torch.arange(120).view(2, 3, 4, 5).to(dtype).transpose(1, 2)
    received = torch.empty_like(sent)
    read_peer_memory(ticket_for(sent), received)
    assert torch.equal(received, sent)


def test_memory_of_a_process_that_has_ended_is_unreadable():
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(MemoryUnreadable, match=f"process {child}: No such process"):
        read_peer_memory(torch.tensor([child, 4096, 4]), torch.ones(1))


def test_an_address_without_memory_is_unreadable():
    with pytest.raises(MemoryUnreadable, match="Bad address"):
        read_peer_memory(torch.tensor([os.getpid(), 4096, 4]), torch.ones(1))


def test_a_machine_is_identified_by_boot_and_namespaces():
    boot, pids, network = same_machine._machine_id()
    assert len(boot.strip()) == 36
    assert (pids[:5], network[:5]) == ("pid:[", "net:[")


def exchange_within_machine(rank: int, world_size: int) -> RingExchange:
    exchange = RingExchange.over(ProcessGroups.build(Grid(ring=world_size), rank).ring_links)
    assert exchange.peer_reader
    return exchange


def late_in_turn(rank: int, world_size: int) -> list:
    """Return what this rank receives in hops of which each has another late rank.

    The late rank waits only after all others have, and these overwrite what they sent.
    """
    exchange = exchange_within_machine(rank, world_size)
    received_values = []
    for hop in range(4):
        sent = torch.full((100_000,), float(10 * rank + hop))
        transfer = exchange.start(sent)
        is_late = rank == hop % world_size
        if is_late:
            dist.barrier()
        received = transfer.wait()
        sent.zero_()
        if not is_late:
            dist.barrier()
        received_values.append(received.unique().tolist())
    return received_values


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_late_receiver_delays_no_sender_and_still_gets_what_was_sent(world_size):
    for rank, received in enumerate(run_ranks(world_size, late_in_turn)):
        previous = (rank - 1) % world_size
        assert received == [[10.0 * previous + hop] for hop in range(4)]


def waiting_in_random_order(rank: int, world_size: int) -> list[bool]:
    """Return whether each transfer was right when ranks wait in different orders."""
    exchange = exchange_within_machine(rank, world_size)
    distances = [*range(1, world_size), *range(1 - world_size, 0)] * 2
    transfers = [
        exchange.start(torch.full((50, 3), 10.0 * rank + i), distance)
        for i, distance in enumerate(distances)
    ]
    order = torch.randperm(len(transfers), generator=torch.Generator().manual_seed(rank)).tolist()
    received = {i: transfers[i].wait().unique().tolist() for i in order}
    return [
        received[i] == [10.0 * ((rank - distance) % world_size) + i]
        for i, distance in enumerate(distances)
    ]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_transfers_may_be_waited_for_in_any_order(world_size):
    for is_right in run_ranks(world_size, waiting_in_random_order):
        assert is_right == [True] * (4 * (world_size - 1))


def of_different_sizes(rank: int, world_size: int) -> list[str]:
    exchange = exchange_within_machine(rank, world_size)
    transfer = exchange.start(torch.ones(10 + rank))
    with pytest.raises(MemoryUnreadable) as refused:
        transfer.wait()
    return re.findall(r"\d+(?= bytes)", str(refused.value))


def test_a_message_of_another_size_is_refused_with_both_sizes():
    assert run_ranks(2, of_different_sizes) == [["44", "40"], ["40", "44"]]


def freed_after_transfer(rank: int, world_size: int) -> bool:
    transfer = exchange_within_machine(rank, world_size).start(torch.ones(10))
    transfer.wait()
    sent = weakref.ref(transfer.sent)
    received = weakref.ref(transfer.received)
    del transfer
    return sent() is None and received() is None


def test_tensors_are_freed_with_their_transfer():
    assert run_ranks(2, freed_after_transfer) == [True, True]


def without_process_vm_readv(*arguments) -> int:
    raise AttributeError("process_vm_readv")


HINDRANCES = {
    "none": {},
    "another machine": {"_machine_id": lambda: ("another", "pid:[1]", "net:[1]")},
    "unknown machine": {"_machine_id": lambda: None},
    "no such system call": {"_readv": without_process_vm_readv},
    "no permission to read": {"_readv": lambda *arguments: -1},
    "other memory at that address": {
        "ticket_for": lambda message: ticket_for(torch.zeros_like(message))
    },
}


def ring_with_hindered_rank(rank: int, world_size: int) -> dict:
    """Return how a ring exchanges, by what hinders rank 1 only."""
    results = {}
    for hindrance, replacements in HINDRANCES.items():
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (replacements if rank == 1 else {}).items():
                patch.setattr(same_machine, name, value)
            results[hindrance] = exchange_once(rank, world_size)
    return results


def exchange_once(rank: int, world_size: int) -> dict:
    groups = ProcessGroups.build(Grid(ring=world_size), rank)
    exchange = RingExchange.over(groups.ring_links)
    received = exchange.start(torch.full((10,), float(rank))).wait()
    return {
        "by tickets": exchange.peer_reader is not None,
        "received": received.unique().tolist(),
    }


def test_all_ranks_use_the_network_if_one_cannot_be_read_or_cannot_read():
    for rank, results in enumerate(run_ranks(3, ring_with_hindered_rank)):
        received = [float((rank - 1) % 3)]
        assert results.pop("none") == {"by tickets": True, "received": received}
        by_network = {"by tickets": False, "received": received}
        assert list(results.values()) == [by_network] * (len(HINDRANCES) - 1)


def has_no_reader_without_probe(rank: int, world_size: int) -> bool:
    return peer_memory_reader(dist.new_group([0, 1])) is None


def test_a_group_that_was_not_probed_has_no_reader():
    assert run_ranks(2, has_no_reader_without_probe) == [True, True]
