"""Which masks and layouts let rows go directly to their readers, and how many are read."""

import itertools

import pytest

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.context_parallel.visible_rows import are_sent_directly, share_read, visible_keys

CONTIGUOUS = Layout("ring", 64, 8)
ZIGZAG = Layout("zigzag", 64, 8)
SINGLE_TOKENS = Layout("striped", 64, 8)
STRIPES = Layout("striped", 64, 8, stripe_size=4)


@pytest.mark.parametrize(
    ("layout", "mask", "directly"),
    [
        (CONTIGUOUS, Mask(), False),
        (CONTIGUOUS, Mask(window=64), False),
        (CONTIGUOUS, Mask(window=16), True),
        (ZIGZAG, Mask(window=16), True),
        (STRIPES, Mask(window=8), True),
        (STRIPES, Mask(window=40), False),
        (SINGLE_TOKENS, Mask(window=8), False),
        (SINGLE_TOKENS, Mask(window=3), True),
        (CONTIGUOUS, Mask(window=48), True),
        (CONTIGUOUS, Mask(window=60), False),
        (SINGLE_TOKENS, Mask(document_starts=(0,)), True),
        (Layout("none", 64, 1), Mask(window=3), False),
    ],
    ids=str,
)
def test_rows_go_directly_where_the_mask_leaves_many_unread(layout, mask, directly):
    assert are_sent_directly(layout, mask) == directly


def share_visible(layout: Layout, window: int) -> float:
    pairs = itertools.permutations(range(layout.ring_size), 2)
    read = sum(len(visible_keys(layout, *pair, Mask(window))) for pair in pairs)
    return read / ((layout.ring_size - 1) * layout.seq_length)


@pytest.mark.parametrize("layout", [CONTIGUOUS, ZIGZAG, SINGLE_TOKENS, STRIPES], ids=str)
@pytest.mark.parametrize("window", [1, 3, 8, 17, 64])
def test_the_share_read_is_that_of_the_visible_keys(layout, window):
    assert share_read(layout, window) == share_visible(layout, window)


def test_the_share_of_a_long_sample_is_estimated_from_a_part_of_its_keys():
    layout = Layout("striped", 2**17, 8, stripe_size=256)
    assert share_read(layout, 1000) == pytest.approx(share_visible(layout, 1000), rel=0.01)


def test_the_ranges_count_keys_among_the_visible_rows():
    """Rank 2 owns 16 to 23 and sees, with a window of 5, the keys 12 to 15 of rank 1."""
    rows = visible_keys(CONTIGUOUS, 2, 1, Mask(window=5))
    assert rows.rows_n.tolist() == [4, 5, 6, 7]
    assert not rows.is_whole
    assert rows.key_ranges.lo.tolist()[:5] == [0, 1, 2, 3, 4]
    assert rows.key_ranges.hi.tolist()[:4] == [4] * 4
