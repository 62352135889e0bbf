"""Messages that are read where they lie: what is read, and who cannot read it."""

import os
import re
import weakref

import pytest
import torch
import torch.distributed as dist

from megatron_ring.parallel import same_machine
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.same_machine import MemoryUnreadable, read, reader_within, ticket_for
from tests.distributed import run_ranks


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8], ids=str
)
def test_a_tensor_is_read_as_it_lies(dtype):
    sent = torch.arange(120).view(2, 3, 4, 5).to(dtype).transpose(1, 2)
    received = torch.empty_like(sent)
    read(ticket_for(sent), received)
    assert torch.equal(received, sent)


def test_of_a_process_that_has_ended_nothing_can_be_read():
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(MemoryUnreadable, match=f"process {child} sent: No such process"):
        read(torch.tensor([child, 4096, 4]), torch.ones(1))


def test_nothing_is_read_where_a_process_has_no_memory():
    with pytest.raises(MemoryUnreadable, match="Bad address"):
        read(torch.tensor([os.getpid(), 4096, 4]), torch.ones(1))


def test_a_machine_is_told_from_others():
    boot, pids, network = same_machine._machine()
    assert len(boot.strip()) == 36
    assert (pids[:5], network[:5]) == ("pid:[", "net:[")


def in_turns(rank: int, world_size: int) -> list:
    """What arrives where one rank looks for it only after all others have, and these write to what they sent."""
    exchange, arrived = within(rank, world_size), []
    for hop in range(4):
        transfer = exchange.start(sent := torch.full((100_000,), float(10 * rank + hop)))
        if late := rank == hop % world_size:
            dist.barrier()
        received = transfer.wait()
        sent.zero_()
        if not late:
            dist.barrier()
        arrived.append(received.unique().tolist())
    return arrived


def within(rank: int, world_size: int) -> RingExchange:
    exchange = RingExchange.over(ProcessGroups.build(Grid(ring=world_size), rank).ring_links)
    assert exchange.fetcher
    return exchange


@pytest.mark.parametrize("world_size", [2, 3])
def test_who_is_busy_keeps_nobody_waiting_and_what_was_sent_may_be_written_to_once_it_is_over(
    world_size,
):
    for rank, found in enumerate(run_ranks(world_size, in_turns)):
        previous = (rank - 1) % world_size
        assert found == [[10.0 * previous + hop] for hop in range(4)]


def crossing(rank: int, world_size: int) -> list:
    """What arrives where ranks wait for their transfers in different orders, over every distance."""
    exchange = within(rank, world_size)
    distances = [*range(1, world_size), *range(1 - world_size, 0)] * 2
    transfers = [
        exchange.start(torch.full((50, 3), 10.0 * rank + i), each)
        for i, each in enumerate(distances)
    ]
    order = torch.randperm(len(transfers), generator=torch.Generator().manual_seed(rank)).tolist()
    arrived = {i: transfers[i].wait().unique().tolist() for i in order}
    return [
        arrived[i] == [10.0 * ((rank - each) % world_size) + i] for i, each in enumerate(distances)
    ]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_transfers_end_in_any_order(world_size):
    assert all(
        all(found) and len(found) == 4 * (world_size - 1)
        for found in run_ranks(world_size, crossing)
    )


def unlike(rank: int, world_size: int) -> list[str]:
    exchange = within(rank, world_size)
    transfer = exchange.start(torch.ones(10 + rank))
    with pytest.raises(MemoryUnreadable) as refused:
        transfer.wait()
    return re.findall(r"\d+ bytes|where \d+", str(refused.value))


def test_a_message_of_another_size_is_not_read():
    sizes = [["44 bytes", "where 40"], ["40 bytes", "where 44"]]
    assert run_ranks(2, unlike) == sizes


def kept(rank: int, world_size: int) -> bool:
    transfer = within(rank, world_size).start(torch.ones(10))
    transfer.wait()
    sent, received = weakref.ref(transfer.sent), weakref.ref(transfer.received)
    del transfer
    return sent() is None and received() is None


def test_nothing_of_a_transfer_is_kept_behind_it():
    assert run_ranks(2, kept) == [True, True]


def hindered(rank: int, world_size: int) -> dict:
    """By what one rank of the ring alone has: whether they read each other's memory, and what is received."""
    hindrances = {
        "nothing": {},
        "a machine of its own": {"_machine": lambda: ("another", "pid:[1]", "net:[1]")},
        "nothing to be told from others by": {"_machine": lambda: None},
        "no such call": {"_readv": without_the_call},
        "no leave to read": {"_readv": lambda *arguments: -1},
        "another's memory at that address": {
            "ticket_for": lambda message: ticket_for(torch.zeros_like(message))
        },
    }
    found = {}
    for hindrance, replaced in hindrances.items():
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (replaced if rank == 1 else {}).items():
                patch.setattr(same_machine, name, value)
            found[hindrance] = met(rank, world_size)
    return found


def without_the_call(*arguments) -> int:
    raise AttributeError("process_vm_readv")


def met(rank: int, world_size: int) -> dict:
    groups = ProcessGroups.build(Grid(ring=world_size), rank)
    exchange = RingExchange.over(groups.ring_links)
    received = exchange.start(torch.full((10,), float(rank))).wait()
    return {"by tickets": exchange.fetcher is not None, "received": received.unique().tolist()}


def test_where_one_rank_cannot_be_read_or_read_all_talk_over_the_network():
    for rank, found in enumerate(run_ranks(3, hindered)):
        received = [float((rank - 1) % 3)]
        assert found.pop("nothing") == {"by tickets": True, "received": received}
        assert list(found.values()) == [{"by tickets": False, "received": received}] * len(found)


def strangers(rank: int, world_size: int) -> bool:
    return reader_within(dist.new_group([0, 1])) is None


def test_who_has_not_met_reads_nothing():
    assert run_ranks(2, strangers) == [True, True]
