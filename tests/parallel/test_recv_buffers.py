import torch

from megatron_ring.parallel.recv_buffers import RecvBufferPool


def test_room_is_for_what_is_alike_and_only_once():
    room, own = RecvBufferPool(), torch.zeros(3)
    first = room.acquire(own)
    room.release(own)
    assert room.acquire(own) is not own, "it was never taken there"
    room.release(first)
    room.release(first)
    assert room.acquire(torch.zeros(4)) is not first
    assert room.acquire(torch.zeros(3, dtype=torch.int32)) is not first
    assert room.acquire(own) is first
    assert room.acquire(own) is not first, "it is taken"
