import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.context_parallel.layout import NAMES, Layout, auto_stripe_size
from megatron_ring.context_parallel.mask import hop_runs
from megatron_ring.errors import ConfigError

SIXTEEN_TOKENS_ON_FOUR_RANKS = {
    ("ring", 1): [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
    ("striped", 1): [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]],
    ("striped", 2): [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]],
    ("striped", 4): [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
    ("zigzag", 1): [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]],
}


@pytest.mark.parametrize(("name", "stripe"), SIXTEEN_TOKENS_ON_FOUR_RANKS)
def test_sixteen_tokens_on_four_ranks(name, stripe):
    layout = Layout(name, 16, 4, stripe)
    shards = [layout.positions(ring_rank).tolist() for ring_rank in range(4)]
    assert shards == SIXTEEN_TOKENS_ON_FOUR_RANKS[name, stripe]


def test_single_tokens_are_dealt_as_in_the_paper():
    """Always forth: rank r owns r, r + R, r + 2R and so on (Brandon et al. 2023, section 3)."""
    for ring_rank in range(5):
        assert Layout("striped", 35, 5).positions(ring_rank).tolist() == list(
            range(ring_rank, 35, 5)
        )


def test_stripes_are_dealt_forth_and_back():
    """Whole stripes, and the rank that was dealt the last one of a round is dealt the first of the next."""
    layout = Layout("striped", 3 * 5 * 4, 3, stripe_size=5)
    stripes = [layout.positions(ring_rank)[::5] // 5 for ring_rank in range(3)]
    assert [each.tolist() for each in stripes] == [[0, 5, 6, 11], [1, 4, 7, 10], [2, 3, 8, 9]]


@pytest.mark.parametrize("name", NAMES)
def test_a_ring_of_one_holds_the_sequence_as_it_is(name):
    assert Layout(name, 6, 1).positions(0).tolist() == [0, 1, 2, 3, 4, 5]


# layouts that exist: zigzag takes even shards, striped whole stripes
layouts = st.one_of(
    st.builds(
        lambda size, length: Layout("ring", size * length, size),
        st.integers(1, 9),
        st.integers(1, 20),
    ),
    st.builds(
        lambda size, half: Layout("zigzag", 2 * size * half, size),
        st.integers(1, 9),
        st.integers(1, 10),
    ),
    st.builds(
        lambda size, stripes, stripe: Layout("striped", size * stripes * stripe, size, stripe),
        st.integers(1, 9),
        st.integers(1, 8),
        st.integers(1, 5),
    ),
)


@given(layouts)
def test_every_token_has_one_home_and_every_rank_as_many_tokens(layout):
    shards = [layout.positions(ring_rank) for ring_rank in range(layout.ring_size)]
    assert {len(shard) for shard in shards} == {layout.shard_length}
    assert torch.cat(shards).sort().values.tolist() == list(range(layout.seq_length))


@given(layouts)
def test_a_rank_lists_its_positions_in_increasing_order(layout):
    for ring_rank in range(layout.ring_size):
        assert (layout.positions(ring_rank).diff() > 0).all()


@given(layouts, st.data())
def test_ulysses_members_share_out_a_shard_in_order(layout, data):
    members = data.draw(st.sampled_from([u for u in range(1, 9) if layout.shard_length % u == 0]))
    for ring_rank in range(layout.ring_size):
        held = [layout.positions(ring_rank, member, members) for member in range(members)]
        assert {len(each) for each in held} == {layout.shard_length // members}
        assert torch.equal(torch.cat(held), layout.positions(ring_rank))


# layouts that share the work out evenly: whole pairs of deals forth and back, or of chunks early and late
even_layouts = st.one_of(
    st.builds(
        lambda size, half: Layout("zigzag", 2 * size * half, size),
        st.integers(1, 9),
        st.integers(1, 10),
    ),
    st.builds(
        lambda size, pairs, stripe: Layout("striped", 2 * size * pairs * stripe, size, stripe),
        st.integers(1, 9),
        st.integers(1, 4),
        st.integers(2, 5),
    ),
)


@given(even_layouts)
def test_every_rank_has_the_same_work_in_every_hop(layout):
    """Half of the square where the keys are another's, and at home half a diagonal more."""
    ranks, length = range(layout.ring_size), layout.shard_length
    for rank, source in itertools.product(ranks, ranks):
        pairs = hop_runs(layout, rank, source).visible_pairs
        assert 2 * pairs == length * (length + 1 if source == rank else length)


@given(st.integers(1, 9), st.integers(0, 3), st.integers(2, 5))
def test_a_round_without_its_way_back_leaves_ranks_a_stripe_apart(ring_size, pairs, stripe):
    layout = Layout("striped", ring_size * (2 * pairs + 1) * stripe, ring_size, stripe)
    keys_seen = [int((layout.positions(ring_rank) + 1).sum()) for ring_rank in range(ring_size)]
    assert keys_seen == [keys_seen[0] + ring_rank * stripe**2 for ring_rank in range(ring_size)]


@given(st.integers(1, 9), st.integers(1, 20))
def test_single_tokens_leave_a_diagonal_between_hops(ring_size, length):
    """With the diagonal for sources that are not ahead, without it for those that are."""
    layout, ranks = Layout("striped", ring_size * length, ring_size), range(ring_size)
    for rank, source in itertools.product(ranks, ranks):
        assert 2 * hop_runs(layout, rank, source).visible_pairs == length * (
            length + (1 if source <= rank else -1)
        )


@pytest.mark.parametrize(
    ("seq_length", "ring_size", "width"),
    [
        (4096, 2, 1),
        (8192, 2, 128),
        (16384, 2, 256),
        (1 << 17, 2, 1024),
        (16384, 4, 128),
        (1 << 18, 8, 256),
        (1 << 20, 64, 128),
    ],
)
def test_packs_are_dealt_in_many_short_rounds(seq_length, ring_size, width):
    """In 32 or more, of 2,048 tokens where a width is so narrow, else in longer ones rather than in single tokens."""
    assert (
        auto_stripe_size(seq_length, ring_size, (2048, 1024, 512, 256, 128), packed=True) == width
    )


# of four ranks with six tokens each: how far back a query looks, and how often keys must be passed on and met
HOPS_OF_A_CONTIGUOUS_RING = {0: 1, 1: 2, 6: 2, 7: 3, 12: 3, 13: 4, 18: 4, 19: 4, 23: 4}


@pytest.mark.parametrize("reach", HOPS_OF_A_CONTIGUOUS_RING)
def test_a_contiguous_ring_goes_as_far_as_its_queries_look(reach):
    assert Layout("ring", 24, 4).hops(reach) == HOPS_OF_A_CONTIGUOUS_RING[reach]
    assert Layout("none", 24, 1).hops(reach) == 1
    for name, stripe in (("striped", 1), ("striped", 3), ("zigzag", 1)):
        assert Layout(name, 24, 4, stripe).hops(reach) == 4


MESSAGES = {
    (
        "diagonal",
        8,
        2,
        1,
    ): "context_parallel 'diagonal' is not a layout. Known: none, ring, striped, zigzag. "
    "Set --context-parallel.",
    ("striped", 8, 2, 0): "stripe_size 0 must be at least 1. Set --stripe-size.",
    ("none", 8, 2, 1): "context_parallel none keeps whole sequences, but the ring has 2 ranks. "
    "Set --context-parallel striped (or ring, zigzag), or --context-parallel-size 1.",
    (
        "ring",
        10,
        4,
        1,
    ): "seq_length 10 cannot be laid out ring on 4 ring ranks: it must be a multiple of 4 "
    "(ring size). Nearest: 8, 12. Set --seq-length.",
    (
        "striped",
        10,
        4,
        1,
    ): "seq_length 10 cannot be laid out striped on 4 ring ranks: it must be a multiple of 4 "
    "(ring size x stripe size). Nearest: 8, 12. Set --seq-length.",
    (
        "striped",
        100,
        4,
        16,
    ): "seq_length 100 cannot be laid out striped on 4 ring ranks: it must be a multiple of 64 "
    "(ring size x stripe size). Nearest: 64, 128. Set --seq-length, or use --context-parallel striped "
    "with --stripe-size 1 (multiple of 4).",
    (
        "zigzag",
        8190,
        4,
        1,
    ): "seq_length 8190 cannot be laid out zigzag on 4 ring ranks: it must be a multiple of 8 "
    "(2 x ring size). Nearest: 8184, 8192. Set --seq-length, or use --context-parallel striped (multiple of 4).",
    (
        "zigzag",
        3,
        4,
        1,
    ): "seq_length 3 cannot be laid out zigzag on 4 ring ranks: it must be a multiple of 8 "
    "(2 x ring size). Nearest: 8. Set --seq-length, or use --context-parallel striped (multiple of 4).",
    (
        "ring",
        0,
        4,
        1,
    ): "seq_length 0 cannot be laid out ring on 4 ring ranks: it must be a multiple of 4 "
    "(ring size). Nearest: 4. Set --seq-length.",
}


# of processes that share a ring rank, with their number last
MESSAGES_OF_ULYSSES = {
    (
        "ring",
        10,
        2,
        1,
        2,
    ): "seq_length 10 cannot be laid out ring on 2 ring ranks of 2 Ulysses ranks: it must be a "
    "multiple of 4 (ring size, and ring size x Ulysses degree). Nearest: 8, 12. Set --seq-length.",
    (
        "striped",
        20,
        2,
        3,
        2,
    ): "seq_length 20 cannot be laid out striped on 2 ring ranks of 2 Ulysses ranks: it must be "
    "a multiple of 12 (ring size x stripe size, and ring size x Ulysses degree). Nearest: 12, 24. Set --seq-length, "
    "or use --context-parallel striped with --stripe-size 1 (multiple of 4).",
    (
        "zigzag",
        16,
        2,
        1,
        3,
    ): "seq_length 16 cannot be laid out zigzag on 2 ring ranks of 3 Ulysses ranks: it must be a "
    "multiple of 12 (2 x ring size, and ring size x Ulysses degree). Nearest: 12, 24. Set --seq-length, "
    "or use --context-parallel striped (multiple of 6).",
}


@pytest.mark.parametrize("asked", MESSAGES_OF_ULYSSES, ids=str)
def test_a_shard_that_ulysses_members_cannot_share_says_why(asked):
    assert Layout.problems(*asked) == [MESSAGES_OF_ULYSSES[asked]]


@given(layouts, st.integers(1, 6), st.integers(1, 200))
def test_what_is_without_problems_can_be_shared_out(layout, members, seq_length):
    name, ring_size, stripe = layout.name, layout.ring_size, layout.stripe_size
    fits = not Layout.problems(name, seq_length, ring_size, stripe)
    shared = not Layout.problems(name, seq_length, ring_size, stripe, members)
    assert shared == (fits and seq_length // ring_size % members == 0)


@pytest.mark.parametrize("asked", MESSAGES, ids=str)
def test_a_layout_that_does_not_exist_says_why_and_what_would(asked):
    assert Layout.problems(*asked) == [MESSAGES[asked]]
    with pytest.raises(ConfigError) as raised:
        Layout(*asked)
    assert str(raised.value) == MESSAGES[asked]


def test_a_layout_that_exists_has_no_problems():
    assert Layout.problems("zigzag", 8192, 4) == []
