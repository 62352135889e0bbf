"""The order in which ranks of a ring exchange directly."""

import numpy as np
import pytest

from megatron_ring.parallel.peers import (
    Peers,
    group_sizes,
    peers_at_distance,
    peers_in_hop,
    receivers_RR,
    senders_RR,
)

each_size = pytest.mark.parametrize("ring_size", [1, 2, 3, 4, 6, 7, 8, 12, 30, 64])


@each_size
def test_every_rank_meets_every_other_once_and_begins_with_itself(ring_size):
    ranks = np.arange(ring_size)
    for peers_RR in (senders_RR(ring_size), receivers_RR(ring_size)):
        assert (peers_RR[0] == ranks).all()
        assert (np.sort(peers_RR, axis=0) == ranks[:, None]).all()
        assert (np.sort(peers_RR, axis=1) == ranks).all()


@each_size
def test_what_a_rank_sends_is_what_its_receiver_gets(ring_size):
    for hop in range(ring_size):
        for rank in range(ring_size):
            peers = peers_in_hop(rank, ring_size, hop)
            assert peers_in_hop(peers.receiver, ring_size, hop).sender == rank
            assert peers.reversed == Peers(peers.sender, peers.receiver)


@each_size
def test_the_first_hops_stay_within_groups_of_neighbours(ring_size):
    sizes = group_sizes(ring_size)
    assert sizes[-1] == ring_size
    for size in sizes:
        groups_RR = senders_RR(ring_size)[:size] // size
        assert (groups_RR == np.arange(ring_size) // size).all()


def test_powers_of_two_exchange_pairs():
    assert peers_in_hop(5, 8, 3) == Peers(6, 6)
    assert (senders_RR(16) == np.arange(16)[:, None] ^ np.arange(16)).all()
    assert group_sizes(16) == [2, 4, 8, 16]


def test_other_sizes_rotate_digit_by_digit():
    assert group_sizes(12) == [2, 4, 12]
    assert senders_RR(3).tolist() == [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
    # 11 is the digits 1, 1, 2 of 2, 2 and 3; hop 5 is 1, 0, 1.
    assert peers_in_hop(11, 12, 5) == Peers(receiver=2, sender=6)


def test_around_the_ring_peers_are_at_a_distance():
    assert peers_at_distance(0, 4, 1) == Peers(receiver=1, sender=3)
    assert peers_at_distance(3, 4, -2) == Peers(receiver=1, sender=1)
