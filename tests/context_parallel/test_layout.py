import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.context_parallel.layout import NAMES, Layout
from megatron_ring.errors import ConfigError

SIXTEEN_TOKENS_ON_FOUR_RANKS = {
    ("ring", 1): [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
    ("striped", 1): [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]],
    ("striped", 2): [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]],
    ("striped", 4): [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
    ("zigzag", 1): [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]],
}


@pytest.mark.parametrize(("name", "stripe"), SIXTEEN_TOKENS_ON_FOUR_RANKS)
def test_sixteen_tokens_on_four_ranks(name, stripe):
    layout = Layout(name, 16, 4, stripe)
    shards = [layout.positions(ring_rank).tolist() for ring_rank in range(4)]
    assert shards == SIXTEEN_TOKENS_ON_FOUR_RANKS[name, stripe]


@pytest.mark.parametrize("name", NAMES)
def test_a_ring_of_one_holds_the_sequence_as_it_is(name):
    assert Layout(name, 6, 1).positions(0).tolist() == [0, 1, 2, 3, 4, 5]


# layouts that exist: zigzag takes even shards, striped whole stripes
layouts = st.one_of(
    st.builds(lambda size, length: Layout("ring", size * length, size), st.integers(1, 9), st.integers(1, 20)),
    st.builds(lambda size, half: Layout("zigzag", 2 * size * half, size), st.integers(1, 9), st.integers(1, 10)),
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


MESSAGES = {
    ("diagonal", 8, 2, 1): "context_parallel 'diagonal' is not a layout. Known: none, ring, striped, zigzag. "
    "Set --context-parallel.",
    ("striped", 8, 2, 0): "stripe_size 0 must be at least 1. Set --stripe-size.",
    ("none", 8, 2, 1): "context_parallel none keeps whole sequences, but the ring has 2 ranks. "
    "Set --context-parallel striped (or ring, zigzag), or --context-parallel-size 1.",
    ("ring", 10, 4, 1): "seq_length 10 cannot be laid out ring on 4 ring ranks: it must be a multiple of 4 "
    "(ring size). Nearest: 8, 12. Set --seq-length.",
    ("striped", 10, 4, 1): "seq_length 10 cannot be laid out striped on 4 ring ranks: it must be a multiple of 4 "
    "(ring size x stripe size). Nearest: 8, 12. Set --seq-length.",
    ("striped", 100, 4, 16): "seq_length 100 cannot be laid out striped on 4 ring ranks: it must be a multiple of 64 "
    "(ring size x stripe size). Nearest: 64, 128. Set --seq-length, or use --context-parallel striped "
    "with --stripe-size 1 (multiple of 4).",
    ("zigzag", 8190, 4, 1): "seq_length 8190 cannot be laid out zigzag on 4 ring ranks: it must be a multiple of 8 "
    "(2 x ring size). Nearest: 8184, 8192. Set --seq-length, or use --context-parallel striped (multiple of 4).",
    ("zigzag", 3, 4, 1): "seq_length 3 cannot be laid out zigzag on 4 ring ranks: it must be a multiple of 8 "
    "(2 x ring size). Nearest: 8. Set --seq-length, or use --context-parallel striped (multiple of 4).",
    ("ring", 0, 4, 1): "seq_length 0 cannot be laid out ring on 4 ring ranks: it must be a multiple of 4 "
    "(ring size). Nearest: 4. Set --seq-length.",
}


@pytest.mark.parametrize("asked", MESSAGES, ids=str)
def test_a_layout_that_does_not_exist_says_why_and_what_would(asked):
    assert Layout.problems(*asked) == [MESSAGES[asked]]
    with pytest.raises(ConfigError) as raised:
        Layout(*asked)
    assert str(raised.value) == MESSAGES[asked]


def test_a_layout_that_exists_has_no_problems():
    assert Layout.problems("zigzag", 8192, 4) == []
