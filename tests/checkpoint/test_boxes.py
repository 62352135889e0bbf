"""Boxes, checked against a tensor whose elements are their own indices."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.checkpoint import boxes

SHAPES = st.lists(st.integers(1, 5), max_size=3).map(tuple)


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    """Return a tensor whose elements are their indices in the flattened tensor."""
    return np.arange(math.prod(shape)).reshape(shape)


def elements(box: boxes.Box, shape: tuple[int, ...]) -> list[int]:
    """Return the flat indices that ``box`` spans, row by row."""
    return numbered(shape)[boxes.slices(box)].flatten().tolist()


@st.composite
def spans(draw, length: int) -> range:
    start = draw(st.integers(0, length - 1))
    return range(start, draw(st.integers(start + 1, length)))


@st.composite
def boxes_in(draw, shape: tuple[int, ...]) -> boxes.Box:
    return tuple(draw(spans(length)) for length in shape)


@st.composite
def cuts(draw) -> tuple[tuple[int, ...], list[int]]:
    """Draw a shape and the borders of ranges of its elements; some ranges are empty."""
    shape = draw(SHAPES)
    inner = draw(st.lists(st.integers(0, math.prod(shape)), max_size=4))
    return shape, sorted([0, *inner, math.prod(shape)])


@given(cuts())
def test_a_range_of_elements_is_its_boxes_one_after_another(drawn):
    shape, borders = drawn
    for start, stop in pairwise(borders):
        pieces = boxes.cut(shape, start, stop)
        indices = [index for box in pieces for index in elements(box, shape)]
        assert indices == list(range(start, stop))
        assert sum(map(boxes.size, pieces)) == stop - start


@given(cuts())
def test_a_range_of_elements_has_few_boxes(drawn):
    shape, borders = drawn
    for start, stop in pairwise(borders):
        assert len(boxes.cut(shape, start, stop)) <= max(1, 2 * len(shape) - 1)


@given(st.data())
def test_the_overlap_of_two_boxes_has_the_elements_in_both(data):
    shape = data.draw(SHAPES)
    a = data.draw(boxes_in(shape))
    b = data.draw(boxes_in(shape))
    shared = set(elements(a, shape)) & set(elements(b, shape))
    common = boxes.overlap(a, b)
    assert shared == (set() if common is None else set(elements(common, shape)))


@given(st.data())
def test_indices_relative_to_another_box_refer_to_the_same_elements(data):
    shape = data.draw(SHAPES)
    outer = data.draw(boxes_in(shape))
    other = data.draw(boxes_in(shape))
    common = boxes.overlap(outer, other)
    if common is not None:
        inner = boxes.relative_to(common, outer)
        values = numbered(shape)[boxes.slices(outer)][boxes.slices(inner)]
        assert values.flatten().tolist() == elements(common, shape)
        assert boxes.moved(inner, outer) == common


@given(cuts(), st.data())
def test_the_boxes_of_all_ranges_are_a_partition_but_not_with_one_missing_or_twice(drawn, data):
    shape, borders = drawn
    pieces = [box for start, stop in pairwise(borders) for box in boxes.cut(shape, start, stop)]
    pieces = data.draw(st.permutations(pieces))
    assert boxes.is_partition(pieces, shape)
    assert not boxes.is_partition(pieces[1:], shape)
    assert not boxes.is_partition([*pieces, pieces[0]], shape)


@given(st.data())
def test_boxes_are_a_partition_if_and_only_if_they_have_each_element_once(data):
    """Most drawn sets overlap, miss elements, or do both with the right sum of sizes."""
    shape = data.draw(SHAPES)
    pieces = data.draw(st.lists(boxes_in(shape), max_size=4))
    indices = sorted(index for box in pieces for index in elements(box, shape))
    assert boxes.is_partition(pieces, shape) == (indices == list(range(math.prod(shape))))


@pytest.mark.parametrize(
    "text", ["0:2,0:2 0:2,0:2", "0:2,0:1 1:3,0:2", "0:1,0:4 0:1,0:4", "0:2,0:4 2:2,0:4"]
)
def test_boxes_whose_sizes_add_up_need_not_be_a_partition(text):
    assert not boxes.is_partition([boxes.parse(box) for box in text.split()], (2, 4))


@pytest.mark.parametrize("text", ["0:4", "0:2,0:2,0:1", "2:0,0:2", "0:2,0:2 1:1,0:2"])
def test_boxes_of_other_dimensions_or_without_elements_are_not_a_partition(text):
    assert not boxes.is_partition([boxes.parse(box) for box in text.split()], (2, 2))


@given(st.data())
def test_a_box_written_as_text_is_parsed_back(data):
    box = data.draw(boxes_in(data.draw(SHAPES)))
    assert boxes.parse(boxes.to_text(box)) == box


@pytest.mark.parametrize(
    "written",
    ["3", "0:3:4", "00:3", " 0:3", "0:1_0", "+0:3", "0:3,", ",", "0-3", "0:x", "0:٣", "0.0:3"],
)
def test_other_text_is_refused(written):
    with pytest.raises(ValueError):  # noqa: PT011  the message is int's or ours
        boxes.parse(written)
