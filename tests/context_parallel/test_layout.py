"""Layouts: every token has one owner, the work is balanced, and illegal lengths are refused."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.context_parallel.layout import NAMES, Layout, auto_stripe_size
from megatron_ring.context_parallel.mask import hop_key_ranges
from megatron_ring.errors import ConfigError
from megatron_ring.kernels.attention.measured import WIDEST

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


def test_single_tokens_are_assigned_as_in_the_paper():
    """Always in one direction: rank r owns r, r + R, r + 2R and so on (Brandon et al. 2023)."""
    layout = Layout("striped", 35, 5)
    for ring_rank in range(5):
        assert layout.positions(ring_rank).tolist() == list(range(ring_rank, 35, 5))


def test_stripes_are_assigned_in_alternating_direction():
    """The rank that gets the last stripe of a round gets the first of the next."""
    layout = Layout("striped", 3 * 5 * 4, 3, stripe_size=5)
    stripes = [layout.positions(ring_rank)[::5] // 5 for ring_rank in range(3)]
    assert [each.tolist() for each in stripes] == [[0, 5, 6, 11], [1, 4, 7, 10], [2, 3, 8, 9]]


@pytest.mark.parametrize("name", NAMES)
def test_a_ring_of_one_has_the_sequence_in_order(name):
    assert Layout(name, 6, 1).positions(0).tolist() == [0, 1, 2, 3, 4, 5]


# Legal layouts: zigzag needs even shards, striped whole stripes.
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
def test_every_token_has_one_owner_and_ranks_own_equally_many(layout):
    shards = [layout.positions(ring_rank) for ring_rank in range(layout.ring_size)]
    assert {len(shard) for shard in shards} == {layout.shard_length}
    assert torch.cat(shards).sort().values.tolist() == list(range(layout.seq_length))


@given(layouts)
def test_a_rank_lists_its_positions_in_increasing_order(layout):
    for ring_rank in range(layout.ring_size):
        assert (layout.positions(ring_rank).diff() > 0).all()


@given(layouts, st.data())
def test_ulysses_ranks_split_a_shard_in_order(layout, data):
    divisors = [size for size in range(1, 9) if layout.shard_length % size == 0]
    ulysses = data.draw(st.sampled_from(divisors))
    for ring_rank in range(layout.ring_size):
        parts = [layout.positions(ring_rank, rank, ulysses) for rank in range(ulysses)]
        assert {len(part) for part in parts} == {layout.shard_length // ulysses}
        assert torch.equal(torch.cat(parts), layout.positions(ring_rank))


# Balanced layouts: pairs of rounds in both directions, or pairs of an early and a late chunk.
balanced_layouts = st.one_of(
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


@given(balanced_layouts)
def test_every_rank_has_the_same_work_in_every_hop(layout):
    """Half of the square for the keys of others, and half a diagonal more for own keys."""
    length = layout.shard_length
    for rank, source in itertools.product(range(layout.ring_size), repeat=2):
        pairs = hop_key_ranges(layout, rank, source).visible_pairs
        assert 2 * pairs == length * (length + 1 if source == rank else length)


@given(st.integers(1, 9), st.integers(0, 3), st.integers(2, 5))
def test_an_odd_number_of_rounds_leaves_adjacent_ranks_one_stripe_apart(ring_size, pairs, stripe):
    layout = Layout("striped", ring_size * (2 * pairs + 1) * stripe, ring_size, stripe)
    keys_seen = [int((layout.positions(ring_rank) + 1).sum()) for ring_rank in range(ring_size)]
    assert keys_seen == [keys_seen[0] + ring_rank * stripe**2 for ring_rank in range(ring_size)]


@given(st.integers(1, 9), st.integers(1, 20))
def test_with_single_tokens_hops_differ_by_a_diagonal(ring_size, length):
    """Queries see the diagonal of source ranks up to their own, and not that of later ones."""
    layout = Layout("striped", ring_size * length, ring_size)
    for rank, source in itertools.product(range(ring_size), repeat=2):
        pairs = hop_key_ranges(layout, rank, source).visible_pairs
        assert 2 * pairs == length * (length + (1 if source <= rank else -1))


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
def test_packed_documents_get_many_short_rounds(seq_length, ring_size, width):
    """At least 32, of up to 2,048 tokens if a width is narrow enough, else longer ones."""
    widths = (2048, 1024, 512, 256, 128)
    assert auto_stripe_size(seq_length, ring_size, widths, packed=True) == width


@pytest.mark.parametrize(
    ("seq_length", "ring_size", "stripe_size"),
    [
        (65536, 8, 4096),
        (131072, 6, 1),
        (131076, 6, 10923),
        (1 << 20, 64, 8192),
        (24, 3, 4),
        (21, 3, 1),
        (16, 5, 1),
        (6, 3, 1),
        (3, 3, 1),
        (65536, 1, 1),
    ],
)
def test_the_widest_stripes_are_the_chunks_of_zigzag(seq_length, ring_size, stripe_size):
    """Where two for each rank divide the sample; else single tokens, as on a ring of one."""
    assert auto_stripe_size(seq_length, ring_size, (WIDEST,), packed=False) == stripe_size
    if stripe_size > 1:
        striped = Layout("striped", seq_length, ring_size, stripe_size)
        zigzag = Layout("zigzag", seq_length, ring_size)
        for ring_rank in range(ring_size):
            assert torch.equal(striped.positions(ring_rank), zigzag.positions(ring_rank))


# Arguments of Layout, and what the problem must state: values, nearest legal values and flags.
PROBLEMS = {
    ("diagonal", 8, 2, 1): (
        ["'diagonal'", "none, ring, striped, zigzag"],
        [],
        ["--context-parallel"],
    ),
    ("striped", 8, 2, 0): (["stripe_size 0", "at least 1"], [], ["--stripe-size"]),
    ("none", 8, 2, 1): (
        ["context_parallel none", "2 ranks"],
        [],
        ["--context-parallel", "--context-parallel-size"],
    ),
    ("ring", 10, 4, 1): (
        ["seq_length 10", "4 ring ranks", "multiple of 4 (ring size)"],
        [8, 12],
        ["--seq-length"],
    ),
    ("striped", 10, 4, 1): (
        ["seq_length 10", "4 ring ranks", "multiple of 4 (ring size x stripe size)"],
        [8, 12],
        ["--seq-length"],
    ),
    ("striped", 100, 4, 16): (
        [
            "seq_length 100",
            "4 ring ranks",
            "multiple of 64 (ring size x stripe size)",
        ],
        [64, 128],
        ["--seq-length"],
    ),
    ("zigzag", 8190, 4, 1): (
        [
            "seq_length 8190",
            "4 ring ranks",
            "multiple of 8 (2 x ring size)",
        ],
        [8184, 8192],
        ["--seq-length"],
    ),
    ("zigzag", 3, 4, 1): (
        ["seq_length 3", "multiple of 8 (2 x ring size)"],
        [8],
        ["--seq-length"],
    ),
    ("ring", 0, 4, 1): (["seq_length 0", "multiple of 4 (ring size)"], [4], ["--seq-length"]),
}

# The same, with the number of Ulysses ranks as the last argument.
PROBLEMS_OF_ULYSSES = {
    ("ring", 10, 2, 1, 2): (
        [
            "seq_length 10",
            "2 ring ranks of 2 Ulysses ranks",
            "multiple of 4 (ring size, and ring size x Ulysses degree)",
        ],
        [8, 12],
        ["--seq-length"],
    ),
    ("striped", 20, 2, 3, 2): (
        [
            "seq_length 20",
            "2 ring ranks of 2 Ulysses ranks",
            "multiple of 12 (ring size x stripe size, and ring size x Ulysses degree)",
        ],
        [12, 24],
        ["--seq-length"],
    ),
    ("zigzag", 16, 2, 1, 3): (
        [
            "seq_length 16",
            "2 ring ranks of 3 Ulysses ranks",
            "multiple of 12 (2 x ring size, and ring size x Ulysses degree)",
        ],
        [12, 24],
        ["--seq-length"],
    ),
}


def assert_states(problem: str, parts: list[str], nearest: list[int], flags: list[str]) -> None:
    assert [part for part in parts if part not in problem] == []
    listed = re.search(r"Nearest: ([\d, ]+)\.", problem)
    assert ([int(length) for length in listed[1].split(", ")] if listed else []) == nearest
    assert re.findall(r"--[a-z-]+", problem) == flags


@pytest.mark.parametrize("arguments", PROBLEMS_OF_ULYSSES, ids=str)
def test_a_shard_that_ulysses_ranks_cannot_split_is_refused(arguments):
    (problem,) = Layout.problems(*arguments)
    assert_states(problem, *PROBLEMS_OF_ULYSSES[arguments])


@given(layouts, st.integers(1, 6), st.integers(1, 200))
def test_a_length_has_no_problems_if_layout_and_ulysses_ranks_can_split_it(
    layout, ulysses, seq_length
):
    arguments = layout.name, seq_length, layout.ring_size, layout.stripe_size
    fits_layout = not Layout.problems(*arguments)
    fits_both = not Layout.problems(*arguments, ulysses)
    assert fits_both == (fits_layout and seq_length // layout.ring_size % ulysses == 0)


@pytest.mark.parametrize("arguments", PROBLEMS, ids=str)
def test_an_illegal_layout_is_refused_with_the_rule_and_the_remedy(arguments):
    (problem,) = Layout.problems(*arguments)
    assert_states(problem, *PROBLEMS[arguments])
    with pytest.raises(ConfigError) as raised:
        Layout(*arguments)
    assert str(raised.value) == problem


def test_a_legal_layout_has_no_problems():
    assert Layout.problems("zigzag", 8192, 4) == []
