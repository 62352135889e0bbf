"""Messages in memory that is shared: when it is taken, when it is free again, and who cannot have it."""

import os

import pytest
import torch
import torch.distributed as dist

from megatron_ring.parallel import shared_memory
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.room import Room
from megatron_ring.parallel.shared_memory import MemoryGone, SharedRoom, is_shared_by
from tests.distributed import run_ranks

# The fields of a ticket.
PID, DESCRIPTOR, NAME = range(3)


@pytest.fixture
def sender() -> SharedRoom:
    return SharedRoom()


@pytest.fixture
def receiver() -> SharedRoom:
    return SharedRoom()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8], ids=str)
def test_a_tensor_arrives_as_it_is_and_in_its_order_of_memory(dtype, sender, receiver):
    sent = torch.arange(120).view(2, 3, 4, 5).to(dtype).transpose(1, 2)
    received = receiver.arrived(sender.posted(sent), sent)
    assert torch.equal(received, sent)
    assert (received.dtype, received.stride()) == (sent.dtype, sent.stride())


def test_what_was_sent_may_be_written_to_at_once_and_what_arrived_too(sender, receiver):
    sent = torch.ones(100)
    received = receiver.arrived(sender.posted(sent), sent)
    sent.zero_()
    assert received.add_(1).unique().tolist() == [2]


def test_memory_is_taken_until_the_last_tensor_on_it_is_gone(sender, receiver):
    message = torch.ones(100)
    first = sender.posted(message)
    assert sender.posted(message)[NAME] != first[NAME], "not yet received"
    received = receiver.arrived(first, message)
    view = received.view(10, 10)[3]
    del received
    assert sender.posted(message)[NAME] != first[NAME], "a view of it is left"
    assert view.unique().tolist() == [1]
    del view
    assert sender.posted(message)[NAME] == first[NAME]


def test_so_much_memory_is_kept_as_was_ever_on_its_way_at_one_time(sender, receiver):
    names = set()
    for size in (100, 7, 100, 50, 1) * 3:
        message = torch.ones(size)
        both = [sender.posted(message), sender.posted(message)]
        names |= {int(ticket[NAME]) for ticket in both}
        [receiver.arrived(ticket, message) for ticket in both]
    assert len(names) == 2


def test_a_small_message_leaves_the_large_memory_to_a_large_one(sender, receiver):
    large, small = torch.ones(1000), torch.ones(10)
    tickets = [sender.posted(large), sender.posted(small)]
    for ticket, like in zip(tickets, (large, small)):
        receiver.arrived(ticket, like)
    assert sender.posted(small)[NAME] == tickets[1][NAME]
    assert sender.posted(large)[NAME] == tickets[0][NAME]


def test_a_forked_child_neither_releases_what_its_parent_reads_nor_writes_to_its_memory(sender, receiver):
    message = torch.ones(100)
    ticket, room = sender.posted(message), SharedRoom.of_this_process()
    received = receiver.arrived(ticket, message)
    if (child := os.fork()) == 0:
        del received
        os._exit(SharedRoom.of_this_process() is room)
    assert os.waitpid(child, 0)[1] == 0
    assert sender.posted(message)[NAME] != ticket[NAME], "still read here"
    assert received.unique().tolist() == [1]


def test_of_a_process_that_has_ended_nothing_can_be_read(receiver):
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(MemoryGone, match=f"process {child}"):
        receiver.arrived(torch.tensor([child, 3, 1]), torch.ones(1))


def test_another_file_of_a_process_is_left_alone(receiver, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345678" * 100)
    with path.open("r+b") as file, pytest.raises(MemoryGone, match="no longer memory for messages"):
        receiver.arrived(torch.tensor([os.getpid(), file.fileno(), 1]), torch.ones(1))
    assert path.read_bytes() == b"12345678" * 100


def test_a_machine_is_told_from_others():
    boot, pids, network = shared_memory._machine()
    assert len(boot.strip()) == 36
    assert (pids[:5], network[:5]) == ("pid:[", "net:[")


def hindered(rank: int, world_size: int) -> dict:
    """By what one rank of the ring alone has: whether they share memory, and what is received."""
    unhindered = shared_memory._machine, os.memfd_create
    hindrances = {
        "nothing": {},
        "a machine of its own": {"_machine": lambda: ("another", "pid:[1]", "net:[1]")},
        "nothing to be told from others by": {"_machine": lambda: None},
        "no memory to share": {"memfd_create": refused},
        "processes that others cannot see": {"getpid": lambda: 2**22},
    }
    found = {}
    for hindrance, replaced in hindrances.items():
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (replaced if rank == 1 else {}).items():
                patch.setattr(shared_memory if hasattr(shared_memory, name) else os, name, value)
            SharedRoom.of_this_process.cache_clear()
            found[hindrance] = met(rank, world_size)
    assert (shared_memory._machine, os.memfd_create) == unhindered
    return found


def refused(name: str) -> int:
    raise OSError(f"no memory for {name}")


def met(rank: int, world_size: int) -> dict:
    groups = ProcessGroups.build(Grid(ring=world_size), rank)
    exchange = RingExchange.over(groups.ring_links)
    received = exchange.start(torch.full((10,), float(rank))).wait()
    return {
        "shared": is_shared_by(groups.ring_links[0]),
        "room": type(exchange.room),
        "received": received.unique().tolist(),
    }


def test_where_one_rank_cannot_share_its_memory_all_talk_over_the_network():
    for rank, found in enumerate(run_ranks(3, hindered)):
        assert found.pop("nothing") == {"shared": True, "room": SharedRoom, "received": [float((rank - 1) % 3)]}
        for each in found.values():
            assert each == {"shared": False, "room": Room, "received": [float((rank - 1) % 3)]}


def alone(rank: int, world_size: int) -> bool:
    return is_shared_by(dist.new_group([0, 1]))


def test_who_has_not_met_shares_nothing():
    assert run_ranks(2, alone) == [False, False]
