import torch

from megatron_ring.parallel.room import Room


def test_room_is_for_what_is_alike_and_only_once():
    room, own = Room(), torch.zeros(3)
    first = room.take(own)
    room.give_back(own)
    assert room.take(own) is not own, "it was never taken there"
    room.give_back(first)
    room.give_back(first)
    assert room.take(torch.zeros(4)) is not first
    assert room.take(torch.zeros(3, dtype=torch.int32)) is not first
    assert room.take(own) is first
    assert room.take(own) is not first, "it is taken"
